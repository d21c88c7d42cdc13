"""What the demo says of a picture: hub/space/app.py puts it on a page.

Nothing here knows gradio. A name of weights is whatever `timm-decor predict` takes; the project's own come with what
they were trained on.
"""

from __future__ import annotations

import functools
from importlib.util import find_spec
from pathlib import Path

from timm_decor.errors import UserError, message
from timm_decor.inference.files import Files
from timm_decor.inference.predict import Predictor
from timm_decor.inference.weights import open_model
from timm_decor.models import PREFIX
from timm_decor.models.staged import Own, own_weights
from timm_decor.publishing.datasets import Data, known
from timm_decor.text import listed, markdown_text
from timm_decor.training.args import predict_parser
from timm_decor.training.options import LoaderOptions, PredictOptions
from timm_decor.training.runtime import make_accelerator

TOP = 5
_NAMED = 12  # classes; of more the others can be unfolded


def choices() -> list[tuple[str, str]]:
    """The project's own weights: words for people, and the name."""
    return [(f"{own.architecture}: {_data(own).name}, {own.classes} classes", name) for name, own in _own().items()]


def answer(path: str | None, weights: str) -> tuple[dict[str, float] | None, str]:
    """The likeliest classes of a picture.

    Args:
        path: of the picture; None for none.
        weights: name of the weights.

    Returns:
        Probabilities by class, the likeliest first, and ""; or None, and in one line why.
    """
    try:
        return classify(path, weights), ""
    except UserError as error:
        return None, f"**{markdown_text(message(error))}**"


def classify(path: str | None, weights: str) -> dict[str, float]:
    """As `answer`.

    Raises:
        UserError: no picture, one that cannot be decoded, or no such weights.
    """
    if path is None:
        raise UserError("no picture yet: drop one in, or paste it")
    predictor = _predictor(weights)
    source = Files([path], predictor.opened.mode)
    predictions, _ = predictor.predict(source, LoaderOptions(1, 0, False), TOP)
    if not predictions:
        raise UserError(source.why_broken(0).replace(path, Path(path).name))  # the folder is the server's
    names = _in_words(predictor.opened.names)
    return {
        names[label]: share for label, share in zip(predictions[0].labels, predictions[0].probabilities, strict=True)
    }


def about(weights: str) -> str:
    """Which classes there are, what becomes of a picture of anything else, and how often it is right, in Markdown."""
    opened, own = _predictor(weights).opened, _own().get(weights)
    names = [markdown_text(name) for name in _in_words(opened.names)]
    of = f"{_data(own).name}'s" if own else "These weights'"
    size = opened.data_config["input_size"]
    text = f"**{of} {len(names)} classes**: {listed(names, _NAMED)}. A picture of anything else gets one of these, too."
    text += f" The model sees the picture scaled and cropped to {size[-1]} x {size[-2]} pixels."
    if own:
        text += f" Its first answer is right for {own.top1:.1f} % of {_data(own).evaluated[0]}."
    if len(names) > _NAMED:
        text += f"\n\n<details><summary>All {len(names)} classes</summary>{', '.join(names)}</details>"
    return text


def examples() -> list[str]:
    """Paths of two photographs that scikit-learn brings along."""
    spec = find_spec("sklearn")  # not imported: it takes its time
    folder = Path(spec.origin).parent / "datasets" / "images" if spec and spec.origin else Path()
    return [str(folder / name) for name in ("flower.jpg", "china.jpg") if (folder / name).is_file()]


@functools.lru_cache(maxsize=4)
def _predictor(weights: str) -> Predictor:
    options = PredictOptions.of(predict_parser("demo").parse([weights, "picture"]))
    device = options.device
    accelerator = make_accelerator(device.device, device.amp, device.amp_dtype)
    opened = open_model(weights, None, False, options.image, options.create)
    return Predictor(opened, device, accelerator, weights)


def _own() -> dict[str, Own]:
    return {f"{PREFIX}{own.architecture}.{own.tag}": own for own in own_weights()}


def _data(own: Own) -> Data:
    return known(own.data, is_folder=True)


def _in_words(names: list[str]) -> list[str]:
    """Names without a synset's number and without what means the same; whole where two would be one."""
    short = [name.partition(" ")[2] if name[:1] == "n" and name[1:9].isdigit() else name for name in names]
    short = [name.partition(",")[0] for name in short]
    return [one if one and short.count(one) == 1 else name for one, name in zip(short, names, strict=True)]
