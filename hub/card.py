"""The model card: metadata that the Hub reads, and prose that a person reads, from what was measured alone."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hub.repository import Options, mine, twin
from hub.trained import Trained
from timm_decor.config import DecorConfig
from timm_decor.training.args import decor_config
from timm_decor.version import __version__

_TEMPLATE = Path(__file__).with_name("card.md.j2")
_PAPERS = (
    "S. Dalm, J. Offergeld, N. Ahmad, M. van Gerven: Efficient Deep Learning with Decorrelated Backpropagation, "
    "[arXiv 2405.02385](https://arxiv.org/abs/2405.02385).",
    "N. Ahmad: Correlations Are Ruining Your Gradient Descent, [arXiv 2407.10780](https://arxiv.org/abs/2407.10780).",
)
_TIMM = "R. Wightman: [PyTorch Image Models](https://github.com/huggingface/pytorch-image-models), 2019."


def render(trained: Trained, results: dict[str, Any], options: Options, repo_id: str, with_r: bool) -> str:
    """README.md of a repository.

    Args:
        trained: the run.
        results: what results.json holds.
        options: of publishing.
        repo_id: owner/name on the Hub.
        with_r: whether decor.safetensors is there.
    """
    data, epoch = trained.data, f"epoch {results['epoch']}"
    rows = _rows(trained, results)
    card = ModelCard.from_template(
        _metadata(trained, results, options, repo_id),
        template_path=str(_TEMPLATE),
        title=f"{trained.architecture}.{options.tag}",
        what=_what(trained, options),
        rows=rows,
        top5=any(row["top5"] != "-" for row in rows),
        how_measured=_how_measured(trained, results, epoch),
        repo_id=repo_id,
        mode="L" if trained.data_config["input_size"][0] == 1 else "RGB",
        label_names=bool(trained.label_names),
        opt=trained.args["opt"],
        lr_example=f"{trained.results['lr'] / 10:.2g}",
        decor_config=_changed_knobs(trained),
        with_r=with_r,
        how_trained=_how_trained(trained),
        compared=trained.comparison is not None,
        limits=_limits(trained, options),
        license=options.license,
        data_license=data.license,
        citations=[*(_PAPERS if trained.decorrelated else ()), _TIMM, *([data.citation] if data.citation else [])],
    )
    return str(card.content)


def score(results: dict[str, Any]) -> dict[str, Any]:
    """The published figures: validate.py's, or training's own where it was not run."""
    found = results["evaluated"]
    if found is not None:
        return {"top1": found["top1"], "top5": found.get("top5"), "loss": found["loss"]}
    last = results["training"]["final"]
    return {"top1": last["eval_top1"], "top5": last.get("eval_top5"), "loss": last["eval_loss"]}


def _metadata(trained: Trained, results: dict[str, Any], options: Options, repo_id: str) -> ModelCardData:
    data, figures = trained.data, score(results)
    metrics = {"top1": "accuracy", "top5": "top-5 accuracy"}
    return ModelCardData(
        license=options.license,
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", *(["timm_decor", "decorrelation"] if trained.decorrelated else [])],
        datasets=[data.hub_id] if data.hub_id else None,
        base_model=options.base_model,
        model_name=repo_id.rsplit("/", 1)[-1],
        eval_results=[
            EvalResult(
                task_type="image-classification",
                dataset_type=data.hub_id or data.name,
                dataset_name=data.name,
                dataset_split=trained.args["val_split"],
                metric_type="accuracy",
                metric_name=label,
                metric_value=round(figures[key], 2),
            )
            for key, label in metrics.items()
            if figures.get(key) is not None
        ],
    )


def _rows(trained: Trained, results: dict[str, Any]) -> list[dict[str, str]]:
    def row(name: str, top1: float, top5: float | None, loss: float, side: Any) -> dict[str, str]:
        shown = "-" if top5 is None else f"{top5:.2f}"
        ms = 1000 * side.seconds_per_step
        return {"name": name, "top1": f"{top1:.2f}", "top5": shown, "loss": f"{loss:.4f}", "epochs": str(side.epochs),
                "lr": f"{side.lr:g}", "ms": f"{ms:.0f}"}  # fmt: skip

    figures, other = score(results), twin(trained)
    rows = [row("**this model**", figures["top1"], figures["top5"], figures["loss"], mine(trained))]
    if other is not None:
        kind, last = "plain twin" if trained.decorrelated else "decorrelated twin", other.evaluated[-1]
        rows.append(row(f"its {kind}", last["eval_top1"], last.get("eval_top5"), last["eval_loss"], other))
    return rows


def _what(trained: Trained, options: Options) -> str:
    how = (
        "trained with decorrelated backpropagation (timm_decor)"
        if trained.decorrelated
        else "trained with plain backpropagation"
    )
    start = (
        f", starting from [{options.base_model}](https://huggingface.co/{options.base_model})"
        if options.base_model
        else ""
    )
    size = trained.data_config["input_size"]
    return (
        f"timm's `{trained.architecture}`, {how} on {trained.data.name} ({trained.metadata['num_classes']} classes, "
        f"{size[-2]} x {size[-1]} pixels){start}."
    )


def _how_measured(trained: Trained, results: dict[str, Any], epoch: str) -> str:
    images = trained.data.split
    precision = ", with the weights in half precision as they are published" if results["dtype"] == "float16" else ""
    if results["evaluated"] is not None:
        text = f"Measured by validate.py on the published file, on {images}{precision}."
    else:
        text = f"Measured by train.py after the last epoch, on {images}."
    text += f" These are the weights after {epoch}: the last, not the best on these images."
    if trained.comparison is not None:
        text += (
            " The twin began with the same weights and saw the same batches; each has the learning rate that suits it."
            " Its figures are those of its own last epoch."
        )
    return text


def _how_trained(trained: Trained) -> str:
    args, machine, versions = trained.args, trained.results["machine"], trained.results["versions"]
    where = machine["gpu"] or f"{machine['cpu']} ({machine['torch_threads']} threads)"
    minutes = trained.results["final"]["seconds"] / 60
    size = args["batch_size"] * args.get("grad_accum_steps", 1)
    known = ", ".join(f"{name} {versions[name]}" for name in ("timm", "torch") if name in versions)
    results = trained.results
    return (
        f"{results['epochs']} epochs of {args['opt']}, batch {size}, peak learning rate {results['lr']:g}, weight "
        f"decay {args['weight_decay']:g}, {args['sched']} schedule: {minutes:.0f} minutes on {where} (timm_decor "
        f"{__version__}, {known})."
    )


def _limits(trained: Trained, options: Options) -> list[str]:
    size = trained.data_config["input_size"]
    limits = [
        f"It knows the {trained.metadata['num_classes']} classes of {trained.data.name}, in images of about "
        f"{size[-2]} x {size[-1]} pixels, and nothing of how it does elsewhere was measured.",
        "It has the biases of its data; do not let it decide about people.",
    ]
    if not options.base_model:
        epochs = trained.results["epochs"]
        limits.append(f"It was trained from scratch for {epochs} epochs: far from what this architecture can do.")
    return limits


def _changed_knobs(trained: Trained) -> dict[str, Any]:
    """The DecorConfig's fields that are not the defaults."""
    if not trained.decorrelated:
        return {}
    given, defaults = decor_config(argparse.Namespace(**trained.args)).to_dict(), DecorConfig().to_dict()
    return {key: value for key, value in given.items() if value != defaults[key]}
