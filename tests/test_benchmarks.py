"""The benchmark scripts run and write what they promise; what they measure is for a quiet machine."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]


def test_step_cost(tmp_path: Path) -> None:
    out = tmp_path / "step_cost.json"
    command = [sys.executable, "benchmarks/step_cost.py", "--smoke", "--model", "resnet10t", "--json", str(out)]
    done = subprocess.run([*command, "--decor-structure", "space"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "a refresh every" in done.stdout
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["config"]["structure"] == "space"
    assert len(result["blocks"]) == 2
    assert all(block[kind] > 0 for block in result["blocks"] for kind in ("plain", "ordinary", "refresh", "amortised"))
    state = result["optimizer_state_bytes"]
    assert state["decorrelated"] > state["plain"] > 0


def test_zoo_study(tmp_path: Path) -> None:
    write_images(tmp_path / "train.parquet", np.random.default_rng(0), 320)
    out = tmp_path / "out.json"
    command = [sys.executable, "benchmarks/zoo_study.py", "--data-dir", str(tmp_path), "--model", "test_efficientnet"]
    command += ["--lr", "0.01", "--without", "*.se.*,depthwise", "classifier", "--img-size", "32", "--epochs", "2"]
    command += ["--train-images", "256", "--held-out", "60", "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = out.read_text(encoding="utf-8")
    assert str(tmp_path) not in text
    runs = json.loads(text)["runs"]
    assert [run["arm"] for run in runs] == ["plain", "every layer", "without *.se.*,depthwise", "without classifier"]
    assert len({run["loss"] for run in runs}) == 4  # each arm trains other layers decorrelated
    assert "without *.se.*,depthwise" in done.stdout


def write_images(path: Path, rng: np.random.Generator, count: int) -> None:
    """Random 32 x 32 images of two classes, as parquet."""
    rows = []
    for image in rng.integers(0, 255, (count, 32, 32, 3), dtype=np.uint8):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "png")
        rows.append({"bytes": file.getvalue(), "path": None})
    pq.write_table(pa.table({"image": rows, "label": [i % 2 for i in range(count)]}), path)
