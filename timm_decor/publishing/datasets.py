"""What a model card says of the data: its name on the Hub, its license and whom to cite. One row a data set."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Data:
    """A data set.

    Attributes:
        name: for people.
        short: in a tag, as in `whiten_tin_r64`.
        hub_id: the data set's repository on the Hub; "" where there is none to name.
        license: a sentence on the license of the images.
        citation: a sentence; "" where nobody is known.
        evaluated: the usual evaluation images, in words, and how many there are.
        hub_split: what the Hub's repository calls them.
    """

    name: str
    short: str
    hub_id: str
    license: str
    citation: str = ""
    evaluated: tuple[str, int] = ("", 0)
    hub_split: str = ""


# By --dataset, or by the last part of --data-dir, in lower case.
DATA = {
    "cifar10": Data(
        "CIFAR-10",
        "cifar10",
        "uoft-cs/cifar10",
        "CIFAR-10 comes without a license of its own; its images were collected from the web for research.",
        "A. Krizhevsky: Learning Multiple Layers of Features from Tiny Images, 2009.",
        ("the 10 000 test images", 10_000),
        "test",
    ),
    "tiny-imagenet": Data(
        "Tiny ImageNet",
        "tin",
        "zh-plus/tiny-imagenet",
        "Tiny ImageNet is a part of ImageNet, whose terms allow non-commercial research and education.",
        "Stanford CS231N: Tiny ImageNet Visual Recognition Challenge; O. Russakovsky et al.: ImageNet Large Scale "
        "Visual Recognition Challenge, IJCV 2015.",
        ("the 10 000 validation images (those of the test set have no public labels)", 10_000),
        "valid",
    ),
    "imagenette128": Data(
        "Imagenette",
        "imagenette",
        "frgfm/imagenette",
        "Imagenette is a part of ImageNet, whose terms allow non-commercial research and education.",
        "J. Howard: [Imagenette](https://github.com/fastai/imagenette), 2019; O. Russakovsky et al.: ImageNet Large "
        "Scale Visual Recognition Challenge, IJCV 2015.",
        ("the 3 925 validation images", 3_925),
        "validation",
    ),
    "flowers102": Data(
        "Oxford Flowers-102",
        "flowers102",
        "nelorth/oxford-flowers",
        "Flowers-102 comes without a license of its own; its images were collected from the web for research.",
        "M.-E. Nilsback, A. Zisserman: Automated Flower Classification over a Large Number of Classes, ICVGIP 2008.",
        ("the 6 149 test images", 6_149),
        "test",
    ),
}
for _other, _name in (("imagenette", "imagenette128"), ("oxford-flowers", "flowers102")):
    DATA[_other] = DATA[_name]
DIGITS = Data(
    "scikit-learn's handwritten digits",
    "digits",
    "",
    "The digits are part of scikit-learn (BSD 3-Clause); they come from the UCI repository, CC BY 4.0.",
    "E. Alpaydin, C. Kaynak: Optical Recognition of Handwritten Digits, UCI, 1998.",
    ("every fifth image of a class", 355),
)


def is_place(name: str) -> bool:
    """Whether what stands behind hfds/ or hfids/ is a folder of somebody's machine, and no name on the Hub."""
    return name.startswith(("/", ".", "~")) or "\\" in name or name[1:2] == ":"


def known(name: str, is_folder: bool) -> Data:
    """The data set of a name such as cifar10, torch/cifar10, hfds/uoft-cs/cifar10 or hfids/...; of another, its name.

    Args:
        name: that of --dataset, or of the folder.
        is_folder: whether it is a folder's: one that is called digits is not scikit-learn's.
    """
    if name == "digits" and not is_folder:
        return DIGITS
    kind, _, rest = name.partition("/")
    is_streamed = kind in ("hfds", "hfids")
    hub_id = rest.split(":")[0] if is_streamed and not is_place(rest) else ""
    key = (hub_id or name).rstrip("/").rsplit("/", 1)[-1].lower().replace("_", "-")
    short = "".join(letter for letter in key if letter.isalnum()) or "data"
    license_ = "Its license is that of its makers; this card knows nothing of it."
    return DATA.get(key) or Data(key, short, hub_id, license_)
