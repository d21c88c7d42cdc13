"""The demo: what it says of a picture, the repository that goes to the Hub, and the page, where gradio is installed."""

from __future__ import annotations

import ast
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from huggingface_hub import HfApi, SpaceCard
from local_hub import LocalHub
from PIL import Image
from training_runs import ROOT, reset_accelerate

import timm_decor
from timm_decor.errors import UserError, exit_code
from timm_decor.inference import demo
from timm_decor.models.staged import own_weights
from timm_decor.publishing import space
from timm_decor.publishing.publish import main

REPO = "me/demo"
SPACE = ROOT / "hub" / "space"
CIFAR, TINY = "decor_resnet18.whiten_cifar10_r64", "decor_resnet18.whiten_tin_r64"


@pytest.fixture(autouse=True)
def _own_predictors() -> None:
    """The models that the demo keeps are those of one Accelerator."""
    reset_accelerate()
    demo._predictor.cache_clear()


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The upper half of scikit-learn's temple: 640 x 200 pixels."""
    path = tmp_path_factory.mktemp("photos") / "temple.png"
    Image.open(demo.examples()[1]).crop((0, 0, 640, 200)).save(path)
    return path


class TestAnswer:
    @pytest.mark.parametrize("weights", [CIFAR, TINY])
    def test_is_what_timm_says(self, weights: str, photo: Path) -> None:
        model = timm.create_model(weights, pretrained=True).eval()
        transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
        with torch.no_grad():
            top = model(transform(Image.open(photo).convert("RGB"))[None]).softmax(1)[0].topk(5)
        shares, problem = demo.answer(str(photo), weights)
        assert problem == "" and shares is not None
        assert list(shares.values()) == pytest.approx(top.values.tolist(), abs=2e-3)
        names = [model.pretrained_cfg["label_names"][label] for label in top.indices]
        assert all(short in name for short, name in zip(shares, names, strict=True))

    def test_of_pictures_in_other_colours(self, photo: Path, tmp_path: Path) -> None:
        gray = Image.open(photo).convert("L")
        gray.save(tmp_path / "gray.png")
        Image.fromarray(np.asarray(gray).astype(np.uint16) * 257).save(tmp_path / "deep.png")
        gray.convert("LA").save(tmp_path / "alpha.png")
        answers = [demo.classify(str(tmp_path / f"{name}.png"), CIFAR) for name in ("gray", "deep", "alpha")]
        assert answers[0] == answers[1] == answers[2]

    @pytest.mark.parametrize(
        ("name", "said"),
        [
            (None, "no picture yet: drop one in, or paste it"),
            ("notes.png", "cannot decode image notes.png: cannot identify image file 'notes.png'"),
            ("cut.png", "cannot decode image cut.png: "),
            ("float.tiff", "cannot decode image float.tiff: its pixels have 32 bits"),
        ],
    )
    def test_of_what_is_no_picture_is_one_line(self, name: str | None, said: str, photo: Path, tmp_path: Path) -> None:
        (tmp_path / "notes.png").write_text("no image")
        (tmp_path / "cut.png").write_bytes(photo.read_bytes()[:3000])
        Image.fromarray(np.zeros((9, 9), np.float32)).save(tmp_path / "float.tiff")
        shares, problem = demo.answer(str(tmp_path / name) if name else None, CIFAR)
        assert shares is None and problem.startswith(f"**{said}") and "\n" not in problem
        assert str(tmp_path) not in problem, "the server's folder is nobody's business"


class TestWords:
    def test_choices_are_the_projects_own(self) -> None:
        assert demo.choices() == [
            ("resnet18: Tiny ImageNet, 200 classes", TINY),
            ("resnet18: Oxford Flowers-102, 102 classes", "decor_resnet18.whiten_flowers102_r64"),
            ("regnety_002: CIFAR-10, 10 classes", "decor_regnety_002.whiten_cifar10_r64"),
            ("resnet18: CIFAR-10, 10 classes", CIFAR),
            ("resnet18: Imagenette, 10 classes", "decor_resnet18.whiten_imagenette_r128"),
        ]

    def test_the_label_set_is_named(self) -> None:
        few, many = demo.about(CIFAR), demo.about(TINY)
        names = "airplane, automobile, bird, cat, deer, dog, frog, horse, ship, truck"
        assert few.startswith(f"**CIFAR-10's 10 classes**: {names}. A picture of anything else gets one of these")
        assert "64 x 64 pixels" in few and "89.7 % of the 10 000 test images" in few and "<details>" not in few
        assert many.startswith("**Tiny ImageNet's 200 classes**: goldfish, European fire salamander, ")
        assert many.count("goldfish") == 2 and "All 200 classes" in many and ", acorn</details>" in many

    def test_of_other_weights(self, monkeypatch: pytest.MonkeyPatch) -> None:
        create = timm.create_model

        def without_weights(name: str, pretrained: bool = False, **kwargs: Any) -> torch.nn.Module:
            return create(name, pretrained=False, **kwargs)

        monkeypatch.setattr(timm, "create_model", without_weights)
        text = demo.about("test_resnet.r160_in1k")
        assert (
            text.startswith("**These weights' 1000 classes**: tench, ")
            and "160 x 160" in text
            and "first answer" not in text
        )

    def test_names_that_would_be_one_stay_whole(self) -> None:
        names = ["n01443537 goldfish, Carassius", "crane, bird", "crane, machine", "nine lives", "n0 x", "3"]
        short = ["goldfish", "crane, bird", "crane, machine", "nine lives", "n0 x", "3"]
        assert demo._in_words(names) == short


class TestRepository:
    def test_its_card_and_requirements_are_of_this_project(self) -> None:
        card = SpaceCard.load(SPACE / "README.md").data.to_dict()
        assert card["models"] == [own.hub_id for own in own_weights()]
        assert (card["sdk"], card["app_file"], card["license"]) == ("gradio", "app.py", "apache-2.0")
        assert len(card["short_description"]) <= 60
        extra = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        assert f'"gradio>={card["sdk_version"]}"' in extra, "the version that it was looked at with"
        assert (SPACE / "requirements.txt").read_text() == f"timm-decor=={timm_decor.__version__}\n"
        assert {file.name for file in SPACE.iterdir() if file.is_file()} == set(space.FILES)
        ast.parse((SPACE / "app.py").read_text(encoding="utf-8"))

    def test_a_dry_run_writes_it(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        folder = tmp_path / "out"
        for words in ([], ["--requirement", "timm-decor @ git+https://example.org/x@v1"]):
            main(["--space", "--repo-id", REPO, "--dry-run", str(folder), *words])
            lines = capsys.readouterr().out.splitlines()
            assert lines[0] == f"{REPO}: in {folder}" and [line.split(":")[0].strip() for line in lines[1:]] == list(
                space.FILES
            )
            for name in space.FILES:
                changed = words and name == space.REQUIREMENTS
                text = f"{words[1]}\n" if changed else (SPACE / name).read_text()
                assert (folder / name).read_text() == text
        (folder / "thesis.tex").write_text("years")
        with pytest.raises(UserError, match=r"holds thesis\.tex, which is not of a publication"):
            main(["--space", "--repo-id", REPO, "--dry-run", str(folder)])

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            ("--space run", "--space publishes the demo, not run"),
            ("--space --half", "--half is the weights', and --space publishes the demo"),
            ("--space --license mit", "--license is the weights'"),
            ("run --requirement timm-decor==9", "--requirement is the Space's: add --space"),
            ("", "CHECKPOINT is needed"),
            ("--space --requirement torch", "begins with timm-decor, not 'torch'"),
            ("--space --repo-id demo", "--repo-id demo: say OWNER/NAME"),
            ("--space --repo-id me/de..mo", "--repo-id me/de..mo: "),
        ],
    )
    def test_what_makes_no_sense_together_is_refused(
        self, words: str, said: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        given = [*([] if "--repo-id" in words else ["--repo-id", REPO]), *words.split()]
        assert exit_code("publish", main, given) == 2
        line = capsys.readouterr().err
        assert said in line and line.count("\n") == 1


@pytest.fixture
def hub(local_hub: LocalHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> LocalHub:
    local_hub.use_in_process(monkeypatch, tmp_path / "cache")
    return local_hub


def publish(*words: str) -> None:
    main(["--space", "--repo-id", REPO, *words])


class TestHub:
    def test_publishes_once(self, hub: LocalHub, capsys: pytest.CaptureFixture[str]) -> None:
        publish("--private")
        repo = hub.repo(f"spaces/{REPO}")
        files = repo.files()
        assert repo.private and repo.sdk == "gradio" and files.pop(".gitattributes")
        assert files == {name: (SPACE / name).read_bytes() for name in space.FILES}
        assert capsys.readouterr().out == f"published README.md, app.py, requirements.txt: {hub.url}/spaces/{REPO}\n"
        before = repo.commits()
        assert [commit.title for commit in before] == ["Publish the demo of timm_decor", "initial commit"]
        publish()
        assert repo.commits() == before and "nothing was done" in capsys.readouterr().out

    def test_branch_and_pull_request(self, hub: LocalHub, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(UserError, match="nothing to open a pull request on"):
            publish("--create-pr")
        publish()
        with pytest.raises(UserError, match="is public already"):
            publish("--private")
        for words in (["--revision", "next"], ["--create-pr"]):
            publish(*words, "--requirement", "timm-decor>=1")
        repo = hub.repo(f"spaces/{REPO}")
        assert (
            repo.files("next")["requirements.txt"] == repo.files("refs/pr/1")["requirements.txt"] == b"timm-decor>=1\n"
        )
        assert repo.files()["requirements.txt"] != b"timm-decor>=1\n"
        assert f"{hub.url}/spaces/{REPO}/discussions/1" in capsys.readouterr().out

    def test_a_space_of_something_else_is_refused(self, hub: LocalHub) -> None:
        api = HfApi()
        api.create_repo(REPO, repo_type="space", space_sdk="gradio")
        api.upload_file(path_or_fileobj=b"mine", path_in_repo="app.py", repo_id=REPO, repo_type="space")
        before = hub.repo(f"spaces/{REPO}").commits()
        for card in (None, b"no card", b"---\n- 1\n---\n", b"---\ntags: [timm]\n---\n"):
            if card:
                hub.repo(f"spaces/{REPO}").commit(
                    "refs/heads/main",
                    {**before[0].files, "README.md": type(before[0].files["app.py"])(card)},
                    "card", "me", parent=before[0].oid,
                )  # fmt: skip
            with pytest.raises(
                UserError, match=r"me/demo holds app\.py, which is not of this demo: publish to another"
            ):
                publish()
        assert hub.repo(f"spaces/{REPO}").files()["app.py"] == b"mine"

    def test_other_files_of_ours_stay_and_a_model_of_that_name_is_no_matter(self, hub: LocalHub) -> None:
        HfApi().create_repo(REPO)
        publish()
        HfApi().upload_file(path_or_fileobj=b"1", path_in_repo="notes.txt", repo_id=REPO, repo_type="space")
        publish("--requirement", "timm-decor")
        files = hub.repo(f"spaces/{REPO}").files()
        assert (files["notes.txt"], files["requirements.txt"]) == (b"1", b"timm-decor\n")
        assert set(hub.repo(REPO).files()) == {".gitattributes"}

    @pytest.mark.parametrize(
        ("failure", "said"),
        [
            (("GET", "/whoami", 401), "does not accept the token"),
            (("POST", "/repos/create", 403), "may not write"),
            (("POST", "/commit/", 409), "changed by somebody else meanwhile"),
            (("POST", "/preupload/", 500), "answered 500"),
            (("POST", "/commit/", "drop"), "the same command tries again"),
        ],
    )
    def test_a_failure_is_one_line_and_leaves_it_as_it_was(
        self, hub: LocalHub, failure: tuple[str, str, int | str], said: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        hub.fail(*failure, times=float("inf"))
        assert exit_code("publish", main, ["--space", "--repo-id", REPO]) == 2
        line = capsys.readouterr().err
        assert said in line and line.count("\n") == 1
        found = hub.repos.get(f"spaces/{REPO}")
        assert found is None or set(found.files()) == {".gitattributes", "README.md"}

    @pytest.mark.parametrize(("token", "said"), [(None, "hf auth login"), ("hf_reader", "may not write")])
    def test_without_the_right_to_write(
        self, local_hub: LocalHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, token: str | None, said: str
    ) -> None:
        local_hub.use_in_process(monkeypatch, tmp_path / "cache", token)
        with pytest.raises(UserError, match=said):
            publish()
        assert not local_hub.repos


def test_the_page(photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks from app.py, as the Space runs it: its functions by what the page would send them."""
    gradio = pytest.importorskip("gradio")
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    app = runpy.run_path(str(SPACE / "app.py"))["app"]
    assert isinstance(app, gradio.Blocks)
    config = app.get_config_file()
    shown = {part["type"]: part["props"] for part in config["components"]}
    assert [value for _, value in shown["dropdown"]["choices"]] == [TINY, CIFAR]
    assert shown["label"]["num_top_classes"] == 5 and shown["image"]["label"] == "Picture"
    functions = {function.name: function for function in app.fns.values()}
    assert {"answer", "about"} <= set(functions)
    picture = functions["answer"].inputs[0]
    sent = gradio.data_classes.ImageData(path=str(photo))
    shares, problem = functions["answer"].fn(picture.preprocess(sent), CIFAR)
    assert len(shares) == 5 and problem == "" and functions["answer"].fn(picture.preprocess(None), CIFAR)[0] is None
    assert yaml.safe_load((SPACE / "README.md").read_text().split("---")[1])["sdk_version"] <= gradio.__version__
