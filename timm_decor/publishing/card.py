"""The model card: metadata that the Hub reads, and prose that a person reads, from what was measured alone."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from timm_decor.config import DecorConfig
from timm_decor.publishing.repository import R_FILE, SAMPLES, Options
from timm_decor.publishing.trained import Trained
from timm_decor.text import counted, markdown_cell, markdown_text, printable
from timm_decor.training.args import decor_config
from timm_decor.training.keeping.starts import trained_on, versions_used
from timm_decor.training.seeing.compare import Side

_TEMPLATE = Path(__file__).with_name("card.md.j2")
_PAPERS = (
    "S. Dalm, J. Offergeld, N. Ahmad, M. van Gerven: Efficient Deep Learning with Decorrelated Backpropagation, "
    "[arXiv 2405.02385](https://arxiv.org/abs/2405.02385).",
    "N. Ahmad: Correlations Are Ruining Your Gradient Descent, [arXiv 2407.10780](https://arxiv.org/abs/2407.10780).",
)
_NAMES = 10  # of classes
_CHANCE = 1.5  # times the accuracy of guessing: a twin below that has learned nothing
_TIMM = "R. Wightman: [PyTorch Image Models](https://github.com/huggingface/pytorch-image-models), 2019."


def render(trained: Trained, results: dict[str, Any], options: Options, repo_id: str, folder: Path) -> str:
    """README.md of a repository.

    Args:
        trained: the run.
        results: what results.json holds.
        options: of publishing.
        repo_id: owner/name on the Hub.
        folder: of the files that are written.
    """
    data = trained.data
    rows = _rows(trained, results)
    card = ModelCard.from_template(
        _metadata(trained, results, options, repo_id),
        template_path=str(_TEMPLATE),
        title=f"{trained.architecture}.{options.tag}",
        what=_what(trained, options),
        rows=rows,
        top5=any(row["top5"] != "-" for row in rows),
        how_measured=_how_measured(trained, results),
        repo_id=repo_id,
        mode="L" if trained.data_config["input_size"][0] == 1 else "RGB",
        label_names=bool(trained.label_names),
        opt=json.dumps(trained.args["opt"]),
        lr_example=f"{trained.results['lr'] / 10:.2g}",
        decor_config=_changed_knobs(trained),
        classes=_classes(trained),
        num_classes=trained.metadata.num_classes,
        samples=SAMPLES if (folder / SAMPLES).is_file() else "",
        with_r=(folder / R_FILE).is_file(),
        how_trained=_how_trained(trained),
        command=_command(trained),
        processes=trained.machine["processes"],
        changed=_changed_on_the_way(trained),
        left_out=", ".join(trained.left_out),
        limits=_limits(trained),
        license=options.license,
        data_license=data.license,
        citations=[*(_PAPERS if trained.decorrelated else ()), _TIMM, *([data.citation] if data.citation else [])],
    )
    return str(card.content)


def score(results: dict[str, Any]) -> dict[str, Any]:
    """The published figures: validate.py's, or training's own where it was not run. Top-1 and top-5 in %."""
    found = results["evaluated"] or results["evaluated_in_training"]
    return {key: found.get(key) for key in ("top1", "top5", "loss")}


def _metadata(trained: Trained, results: dict[str, Any], options: Options, repo_id: str) -> ModelCardData:
    data, figures = trained.data, score(results)
    whole = _usual_images(trained, results)
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
                dataset_type=data.hub_id or printable(data.name),
                dataset_name=printable(data.name),
                dataset_split=data.hub_split if whole and data.hub_split else trained.args["val_split"],
                metric_type="accuracy",
                metric_name=label,
                metric_value=round(figures[key], 2),
            )
            for key, label in metrics.items()
            if figures.get(key) is not None
        ],
    )


def _rows(trained: Trained, results: dict[str, Any]) -> list[dict[str, str]]:
    def row(name: str, scores: dict[str, Any], side: Side, epochs: int) -> dict[str, str]:
        shown = {key: "-" if scores.get(key) is None else f"{scores[key]:.2f}" for key in ("top1", "top5")}
        loss = "-" if scores.get("loss") is None else f"{scores['loss']:.4f}"
        return {"name": name, **shown, "loss": loss, "epochs": str(epochs), "lr": f"{side.lr:.3g}"}

    rows = [row("**this model**", score(results), trained.side, trained.epoch)]
    if trained.twin is not None:
        twin = trained.twin
        last, prefix = (twin.evaluated[-1] if twin.evaluated else {}), "ema" if trained.averaged else "eval"
        kind = "plain twin" if trained.decorrelated else "decorrelated twin"
        chance = 100 / trained.metadata.num_classes
        word = "" if last.get(f"{prefix}_top1", 100.0) > _CHANCE * chance else " (no better than guessing)"
        failed = f" ({markdown_cell(twin.outcome)})" if twin.failure else word
        scores = {key: last.get(f"{prefix}_{key}") for key in score(results)}
        rows.append(row(f"its {kind}{failed}", scores, twin, len(twin.history)))
    return rows


def _what(trained: Trained, options: Options) -> str:
    how = "decorrelated backpropagation (timm_decor)" if trained.decorrelated else "plain backpropagation"
    base = options.base_model
    start = f", starting from [{base}](https://huggingface.co/{base})" if base else ""
    size, classes = trained.data_config["input_size"], trained.metadata.num_classes
    data = markdown_text(trained.data.name)
    return (
        f"timm's `{trained.architecture}`, trained with {how} on {data} ({classes} classes, "
        f"{size[-2]} x {size[-1]} pixels){start}."
    )


def _classes(trained: Trained) -> str:
    names = [markdown_text(name) for name in trained.label_names]
    if not names:
        return ""
    shown = f"{', '.join(names[:_NAMES])}" + (", ..." if len(names) > _NAMES else "")
    return f"Its {len(names)} classes: {shown} (all by number: `label_names` in config.json)."


def _usual_images(trained: Trained, results: dict[str, Any]) -> str:
    """The data set's usual evaluation images in words, if it was all of them that were evaluated; "" otherwise."""
    words, count = trained.data.evaluated
    images = (results["evaluated"] or {}).get("images")
    return words if images == count and "[" not in trained.args["val_split"] else ""


def _how_measured(trained: Trained, results: dict[str, Any]) -> str:
    found = results["evaluated"]
    images = _usual_images(trained, results)
    if not images:
        images = f"{found['images']} images" if found else "the images"
        images += f" of the split {markdown_text(trained.args['val_split'])}"
    precision = ", with the weights in half precision as they are published" if results["dtype"] == "float16" else ""
    if found is not None:
        text = f"Measured by validate.py on the published file, on {images}{precision}."
    else:
        text = f"Measured by train.py after epoch {trained.epoch}, on {images}."
    kind = "averaged (EMA) weights" if trained.averaged else "weights"
    when = "the last epoch" if trained.is_last else f"epoch {trained.epoch} of {len(trained.side.history)}"
    picked = ", picked as the best on these images" if trained.is_picked else ""
    if trained.is_last and not picked:
        picked = ", whether or not the best on these images"
    text += f" These are the {kind} after {when}{picked}."
    if trained.twin is not None:
        alike = (
            "was trained in a run of its own, with the same recipe and seed"
            if trained.twin_apart
            else "began with the same weights and saw the same batches"
        )
        text += f" The twin {alike}, with the learning rate in its row; its figures are those of its own last epoch."
    return text


def _how_trained(trained: Trained) -> str:
    args, results = trained.args, trained.results
    starts, steps = results["starts"], results["final"]["steps"]
    where = markdown_text(trained_on(starts, steps))
    minutes = round(results["final"]["seconds"] / 60)
    time = counted(round(minutes / 60), "hour") if minutes >= 180 else counted(max(1, minutes), "minute")
    images = f" on {counted(results['images']['training'], 'image')}" if results["images"] else ""
    size = args["batch_size"] * args.get("grad_accum_steps", 1) * trained.machine["processes"]
    packages = ("timm_decor", "timm", "torch")
    known = ", ".join(f"{name} {versions_used(starts, steps, name, markdown_text)}" for name in packages)
    epochs = f"{counted(results['epochs'], 'epoch')} of {markdown_text(args['opt'])}{images}"
    return (
        f"{epochs}, batch {size}, peak learning rate {results['lr']:.3g}, weight decay {args['weight_decay']:g}, "
        f"{args['sched']} schedule: {time} on {where} ({known}).{_beside(trained)}"
    )


def _beside(trained: Trained) -> str:
    return (
        " Other work ran on that machine beside it: take the time as an upper bound." if trained.beside_others else ""
    )


def _command(trained: Trained) -> str:
    words = ["train.py", "-c", "recipe.yaml", *(["--data-dir", "FOLDER"] if trained.args.get("data_dir") else [])]
    return " ".join(words)


def _changed_on_the_way(trained: Trained) -> str:
    """What resuming with other arguments changed; "" where the recipe is that of the whole run."""

    def words(changed: dict[str, list[str]]) -> str:
        ways = {name: " -> ".join(map(markdown_text, pair)) for name, pair in changed.items()}
        return ", ".join(f"{markdown_text(name)} {way}" for name, way in ways.items())

    found = trained.results["changed"]
    return "; ".join(f"after {counted(each['steps'], 'update')} {words(each['changed'])}" for each in found)


def _limits(trained: Trained) -> list[str]:
    size = trained.data_config["input_size"]
    limits = [
        f"It knows the {trained.metadata.num_classes} classes of {markdown_text(trained.data.name)}, in images of "
        f"about {size[-2]} x {size[-1]} pixels, and nothing of how it does elsewhere was measured.",
        "It has the biases of its data; do not let it decide about people.",
    ]
    if not trained.began_with:
        limits.append(f"It was trained from scratch, for {counted(trained.results['epochs'], 'epoch')}.")
    return limits


def _changed_knobs(trained: Trained) -> dict[str, Any]:
    """The DecorConfig's fields that are not the defaults."""
    if not trained.decorrelated:
        return {}
    given, defaults = decor_config(argparse.Namespace(**trained.args)).to_dict(), DecorConfig().to_dict()
    return {key: value for key, value in given.items() if value != defaults[key]}
