"""Twins that train.py trained in two runs, compared as --compare compares those of one.

    python benchmarks/compare_runs.py output/NAME/decorrelated output/NAME/plain --out benchmarks/results/NAME

Two runs fill two cores, and may be made on two machines. They must be alike but for decorrelation and learning rate,
which is checked; they begin with the same weights and see the same batches, because both follow from the seed.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from study.results import replace_text
from timm_decor.errors import exit_code
from timm_decor.publishing.trained import find, read, with_twin
from timm_decor.training.keeping.privacy import PRIVATE, cleaned
from timm_decor.training.seeing.compare import as_json, verdict


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the decorrelated run")
    parser.add_argument("twin", type=Path, help="folder of the plain one")
    parser.add_argument("--out", type=Path, required=True, help="folder for compare.json")
    args = parser.parse_args(argv)
    trained = with_twin(read(find(args.run)[0]), args.twin)
    images = (trained.results["images"] or {}).get("evaluation")
    mine, other = (replace(side, images=images) for side in trained.sides)
    config = {name: cleaned(value) for name, value in trained.args.items() if name not in PRIVATE}
    context = {"config": config, **{key: trained.results[key] for key in ("versions", "machine", "starts", "load")}}
    replace_text(args.out / "compare.json", json.dumps(as_json((mine, other), context), indent=1) + "\n")
    print(verdict((mine, other)))


if __name__ == "__main__":
    sys.exit(exit_code("compare_runs.py", main))
