"""Publishing: from a training run to a repository that timm loads without this project, over a Hub on loopback."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import compare_runs
import pytest
import timm
import torch
import yaml
from huggingface_hub import HfApi, ModelCard
from local_hub import LocalHub
from PIL import Image
from safetensors.torch import load_file, save_file
from training_runs import DECOR, ROOT, history, reset_accelerate, train

from timm_decor.digest import sha256
from timm_decor.errors import UserError, exit_code
from timm_decor.publishing.datasets import known
from timm_decor.publishing.publish import main
from timm_decor.publishing.repository import FILES
from timm_decor.publishing.trained import Trained
from timm_decor.training import validation
from timm_decor.version import __version__

REPO = "me/digits"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished comparison; nothing may write into it."""
    return train(tmp_path_factory.mktemp("runs") / "run", "--epochs", 2, *DECOR, "--compare")


@pytest.fixture
def hub(local_hub: LocalHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> LocalHub:
    local_hub.use_in_process(monkeypatch, tmp_path / "cache")
    return local_hub


def publish(path: Path, *words: str, repo: str = REPO) -> None:
    reset_accelerate()
    main([str(path), "--repo-id", repo, *words])


def staged(run: Path, tmp_path: Path, *words: str) -> Path:
    publish(run / "decorrelated", "--dry-run", str(tmp_path / "staged"), *words)
    return tmp_path / "staged"


def test_the_folder_is_complete_and_says_what_was_measured(run: Path, tmp_path: Path) -> None:
    folder = staged(run, tmp_path)
    assert {file.name for file in folder.iterdir()} == {*FILES} - {"predictions.png"}
    reset_accelerate()
    words = f"--dataset digits --split test[:70] --device cpu -j 0 --results-file {tmp_path}/row.json"
    validation.main(["--checkpoint", str(folder / "model.safetensors"), *words.split()])
    row = json.loads((tmp_path / "row.json").read_text())
    card = ModelCard.load(folder / "README.md")
    values = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert values == {"accuracy": round(row["top1"], 2), "top-5 accuracy": round(row["top5"], 2)}
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "timm")
    results = json.loads((run / "decorrelated" / "results.json").read_text())
    assert row["top1"] == pytest.approx(results["final"]["eval_top1"], abs=1e-3)
    assert f"| **this model** | {row['top1']:.2f} |" in card.text
    twin = json.loads((run / "plain" / "results.json").read_text())["final"]
    assert f"| its plain twin | {twin['eval_top1']:.2f} |" in card.text
    cfg = json.loads((folder / "config.json").read_text())
    assert cfg["architecture"] == "test_resnet" and cfg["label_names"] == [str(digit) for digit in range(10)]
    assert cfg["pretrained_cfg"]["tag"] == "whiten_digits_r32" and cfg["pretrained_cfg"]["input_size"] == [3, 32, 32]
    assert not {"url", "hf_hub_id", "origin_url", "file"} & cfg["pretrained_cfg"].keys()  # the twin's provenance


def test_the_same_run_gives_the_same_bytes_and_none_of_them_name_this_machine(run: Path, tmp_path: Path) -> None:
    first, second = staged(run, tmp_path / "a"), staged(run, tmp_path / "b")
    for name in sorted(file.name for file in first.iterdir()):
        content = (first / name).read_bytes()
        assert content == (second / name).read_bytes(), name
        assert str(run.parent.parent).encode() not in content and str(ROOT).encode() not in content, name


def test_the_card_tells_what_the_model_knows_and_how_it_was_trained(run: Path, tmp_path: Path) -> None:
    card = (staged(run, tmp_path, "--samples") / "README.md").read_text()
    assert "Its 10 classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 (all by number: `label_names` in config.json)." in card
    assert "pretrained=True, num_classes=10)\nmodel = timm_decor.decorrelate(model)\n" in card
    assert "2 epochs of sgd on 128 images, batch 32" in card and "1 minute on" in card and "1 minutes" not in card
    assert "](predictions.png)" in card
    image = Image.open(tmp_path / "staged" / "predictions.png")
    assert image.width > 1000, "six images in a row"


@pytest.mark.parametrize("workers", [0, None])
@pytest.mark.parametrize(("load", "told"), [(1.1, False), (8.0, True), (None, False)])
def test_the_card_says_when_the_machine_was_shared(
    run: Path, tmp_path: Path, load: float | None, told: bool, workers: int | None
) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    file = copy / "decorrelated" / "results.json"
    results = json.loads(file.read_text())
    assert results["load"] > 0 and results["images"] == {"training": 128, "evaluation": 70}
    threads = results["machine"]["torch_threads"]
    assert results["machine"]["workers"] == 0
    if workers is None:  # as most people train: what that came to is in results.json
        args = yaml.safe_load((copy / "args.yaml").read_text())
        (copy / "args.yaml").write_text(yaml.safe_dump({**args, "workers": None}))
    file.write_text(json.dumps(results | {"load": load and load * threads}))
    card = (staged(copy, tmp_path, "--no-eval") / "README.md").read_text()
    assert ("Other work ran on that machine" in card) == told


def test_the_card_names_each_machine_and_a_run_of_an_earlier_version_its_one(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    file = copy / "decorrelated" / "results.json"
    results = json.loads(file.read_text())
    one = {"machine": {**results["machine"], "cpu": "here", "torch_threads": 1}, "versions": results["versions"]}
    other = {"machine": {**one["machine"], "cpu": "th<b>ere"}, "versions": {**one["versions"], "torch": "9"}}
    steps = results["final"]["steps"]
    for starts, words in (
        ({"starts": [{"steps": 0, **one}]}, f"on here (1 thread) (timm_decor {__version__}, "),
        (
            {"starts": [{"steps": 0, **one}, {"steps": steps // 2, **other}]},
            f"here (1 thread, 50 % of the updates), then th\\<b>ere (1 thread) (timm_decor {__version__}, ",
        ),
        ({}, f"on here (1 thread) (timm_decor {__version__}, "),
    ):
        file.write_text(json.dumps({key: value for key, value in results.items() if key != "starts"} | one | starts))
        at = tmp_path / f"of {len(words)} {len(starts)}"
        card = (staged(copy, at, "--no-eval") / "README.md").read_text()
        assert words in card
        assert (f"torch {torch.__version__}, then 9)" in card) == ("then" in words)
        assert "FOLDER` repeats it" in card or "yaml` repeats it" in card
    several = {"steps": 0, **one, "machine": {**one["machine"], "processes": 3}}
    file.write_text(json.dumps(results | {"starts": [several, {"steps": steps, **one}]}))
    card = (staged(copy, tmp_path / "several", "--no-eval") / "README.md").read_text()
    size = 3 * yaml.safe_load((copy / "args.yaml").read_text())["batch_size"]
    assert f"batch {size}," in card and "` on 3 processes repeats it" in card
    for wrong in ([], [{"steps": 4, **one}, {"steps": 4, **other}], [{**one}], [{"steps": 0, "machine": {}}], 3):
        file.write_text(json.dumps(results | {"starts": wrong}))
        with pytest.raises(UserError, match=r"results\.json, starts|results\.json: starts"):
            staged(copy, tmp_path / "wrong", "--no-eval")


@pytest.mark.parametrize(("top1", "told"), [(14.0, True), (16.0, False)])
def test_the_card_says_when_the_twin_guessed(run: Path, tmp_path: Path, top1: float, told: bool) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    compared = json.loads((copy / "compare.json").read_text())
    compared["sides"][1]["history"][-1]["eval_top1"] = top1
    (copy / "compare.json").write_text(json.dumps(compared))
    card = (staged(copy, tmp_path, "--no-eval") / "README.md").read_text()
    assert ("| its plain twin (no better than guessing) | 14.00 |" in card) == told


def test_samples_need_an_evaluation(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--samples are images that are evaluated: leave out --no-eval"):
        staged(run, tmp_path, "--samples", "--no-eval")


def test_recipe_repeats_the_training(run: Path, tmp_path: Path) -> None:
    recipe = staged(run, tmp_path) / "recipe.yaml"
    again = train(tmp_path / "again", "-c", str(recipe), base=[])
    before, after = (load_file(folder / "decorrelated" / "last.safetensors") for folder in (run, again))
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_process_without_the_plugin_gets_the_same_outputs(run: Path, hub: LocalHub, tmp_path: Path) -> None:
    publish(run / "decorrelated")
    code = (
        "import sys, timm, torch\n"
        f"model = timm.create_model('hf-hub:{REPO}', pretrained=True).eval()\n"
        "assert not [name for name in sys.modules if name.startswith('timm_decor')]\n"
        "assert model.pretrained_cfg['label_names'][3] == '3' and model.num_classes == 10\n"
        "torch.manual_seed(0)\n"
        "torch.save(model(torch.randn(2, 3, 32, 32)).detach(), sys.argv[1])\n"
    )
    model = timm.create_model("decor_test_resnet", num_classes=10).eval()
    model.load_state_dict(load_file(run / "decorrelated" / "last.safetensors"))
    torch.manual_seed(0)
    expected = model(torch.randn(2, 3, 32, 32)).detach()
    for offline in (False, True):  # the second time from the cache
        out, cache = tmp_path / f"{offline}.pt", tmp_path / "other"
        environment = hub.environment(cache, token=None, offline=offline)
        subprocess.run([sys.executable, "-c", code, out], check=True, cwd=tmp_path, env=environment)
        assert torch.equal(torch.load(out, weights_only=True), expected)


def test_publishing_twice_changes_nothing(run: Path, hub: LocalHub, capsys: pytest.CaptureFixture[str]) -> None:
    publish(run / "decorrelated")
    before = hub.repo(REPO).commits()
    publish(run / "decorrelated")
    assert hub.repo(REPO).commits() == before
    assert "nothing was done" in capsys.readouterr().out


def test_what_an_earlier_publication_had_more_is_removed_and_what_is_not_ours_stays(run: Path, hub: LocalHub) -> None:
    publish(run / "decorrelated")
    HfApi().upload_file(path_or_fileobj=b"mine", path_in_repo="notes.txt", repo_id=REPO)
    publish(run / "decorrelated", "--no-r")
    assert set(hub.repo(REPO).files()) - {".gitattributes"} == {*FILES, "notes.txt"} - {
        "decor.safetensors",
        "predictions.png",
    }


def test_pull_request_branch_and_private(run: Path, hub: LocalHub, capsys: pytest.CaptureFixture[str]) -> None:
    publish(run / "decorrelated", "--private")
    assert hub.repo(REPO).private
    main_before = hub.repo(REPO).commits("main")
    publish(run / "plain", "--revision", "plain")
    assert json.loads(hub.repo(REPO).files("plain")["config.json"])["pretrained_cfg"]["tag"] == "bp_digits_r32"
    assert "decor.safetensors" not in hub.repo(REPO).files("plain")
    publish(run / "plain", "--create-pr")
    assert hub.repo(REPO).commits("main") == main_before
    assert "discussions" in capsys.readouterr().out


FAILURES = [
    ("401", ("GET", "/whoami", 401), "does not accept the token"),
    ("403", ("POST", "/commit/", 403), "may not write"),
    ("404", ("POST", "/preupload/", 404), "does not know"),
    ("409", ("POST", "/commit/", 409), "somebody else"),
    ("429", ("POST", "/commit/", 429), "too many requests"),
    ("500", ("POST", "/commit/", 500), "answered 500"),
    ("500 in the upload", ("PUT", "/storage/", 500), "answered 500"),
    ("dropped upload", ("PUT", "/storage/", "drop"), "or complete; the same command tries again"),
    ("corrupt upload", ("PUT", "/storage/", "corrupt"), "refuses to upload (me/digits, 400)"),
    ("dropped commit", ("POST", "/commit/", "drop"), "or complete; the same command tries again"),
]


@pytest.mark.parametrize(("failure", "words"), [f[1:] for f in FAILURES], ids=[f[0] for f in FAILURES])
def test_a_failure_is_one_line_and_leaves_the_repository_as_it_was(
    run: Path, hub: LocalHub, failure: tuple[str, str, int | str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(run / "plain")
    before = hub.repo(REPO).files(), hub.repo(REPO).commits()
    hub.fail(*failure, times=float("inf"))
    reset_accelerate()
    assert exit_code("hub.publish", main, [str(run / "decorrelated"), "--repo-id", REPO, "--no-eval"]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("hub.publish: error: ") and words in line
    assert (hub.repo(REPO).files(), hub.repo(REPO).commits()) == before


def test_a_lost_answer_leaves_the_repository_complete(run: Path, hub: LocalHub) -> None:
    hub.fail("POST", "/commit/", "lost", times=float("inf"))
    with pytest.raises(UserError, match="upload"):
        publish(run / "decorrelated", "--no-eval")
    assert {*FILES} - {"predictions.png"} <= set(hub.repo(REPO).files())


@pytest.mark.parametrize(
    ("token", "words"), [(None, "hf auth login"), ("hf_reader", "may not write"), ("hf_x", "token")]
)
def test_without_the_right_to_write(
    run: Path, local_hub: LocalHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, token: str | None, words: str
) -> None:
    local_hub.use_in_process(monkeypatch, tmp_path / "cache", token)
    with pytest.raises(UserError, match=words) as error:
        publish(run / "decorrelated", "--no-eval")
    assert len(str(error.value).splitlines()) == 1 and REPO not in local_hub.repos
    assert token is None or token not in str(error.value)


def test_a_repository_of_another_model_is_refused(run: Path, hub: LocalHub) -> None:
    api = HfApi()
    api.create_repo(REPO)
    api.upload_file(path_or_fileobj=b"x", path_in_repo="pytorch_model.bin", repo_id=REPO)
    with pytest.raises(UserError, match="holds pytorch_model.bin without a config.json"):
        publish(run / "plain", "--no-eval")
    api.upload_file(path_or_fileobj=b'{"architecture": "vgg11"}', path_in_repo="config.json", repo_id=REPO)
    with pytest.raises(UserError, match="holds a vgg11, not a test_resnet"):
        publish(run / "plain", "--no-eval")


def test_a_folder_of_runs(run: Path, hub: LocalHub) -> None:
    publish(run, "--no-eval", repo="me")
    assert set(hub.repos) == {"me/test_resnet.whiten_digits_r32", "me/test_resnet.bp_digits_r32"}
    with pytest.raises(UserError, match="holds 2 models: --repo-id OWNER alone"):
        publish(run, "--no-eval")
    with pytest.raises(UserError, match="say OWNER/NAME"):
        publish(run / "plain", "--no-eval", repo="me")


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twins that had runs of their own; of the plain one only what is kept of it. Nothing may write into it."""
    folder = tmp_path_factory.mktemp("apart")
    train(folder / "decorrelated", "--epochs", 2, *DECOR)
    plain = train(folder / "whole", "--epochs", 2, "--lr", 0.04)
    (folder / "plain").mkdir()
    for name in ("args.yaml", "results.json", "summary.csv"):
        shutil.copy(plain / name, folder / "plain")
    return folder


def test_a_twin_of_another_run_has_its_row(apart: Path, tmp_path: Path) -> None:
    folder = staged(apart, tmp_path, "--no-eval", "--twin", str(apart / "plain"))
    card = (folder / "README.md").read_text()
    twin = json.loads((apart / "plain" / "results.json").read_text())["final"]
    assert re.search(rf"\| its plain twin[^|]* \| {twin['eval_top1']:.2f} \|.* \| 2 \| 0.04 \|", card)
    assert "The twin was trained in a run of its own, with the same recipe and seed" in " ".join(card.split())
    results = json.loads((folder / "results.json").read_text())
    assert (results["twin"]["lr"], results["twin"]["apart"]) == (0.04, True)
    assert results["twin"]["final"]["eval_top1"] == twin["eval_top1"]


def test_twins_of_two_runs_are_compared(apart: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare_runs.main([str(apart / "decorrelated"), str(apart / "plain"), "--out", str(tmp_path)])
    found = json.loads((tmp_path / "compare.json").read_text())
    assert found["verdict"] == capsys.readouterr().out.strip() and found["config"]["opt"] == "sgd"
    for side, name in zip(found["sides"], ("decorrelated", "plain"), strict=True):
        final = json.loads((apart / name / "results.json").read_text())["final"]
        assert side["final_top1"] == pytest.approx(final["eval_top1"])
    assert str(apart.parent) not in (tmp_path / "compare.json").read_text()


def test_a_run_of_its_own_is_the_same_training(run: Path, apart: Path) -> None:
    """From the same weights on the same batches, because both follow from the seed."""
    mine, other = (history(folder) for folder in (run / "decorrelated", apart / "decorrelated"))
    assert [row["train_loss"] for row in mine] == [row["train_loss"] for row in other]


OTHER_TWINS = [
    ("args.yaml", {"epochs": 3}, "was not trained as its twin: epochs is 3, and 2 in"),
    ("args.yaml", {"seed": 7}, "was not trained as its twin: seed is 7, and 42 in"),
    ("args.yaml", {"model": "decor_resnet18"}, "was not trained as its twin: model is resnet18, and test_resnet in"),
    ("args.yaml", {"data_dir": "there", "dataset": "folder"}, "data is there, and digits in"),
    ("args.yaml", {"initial_checkpoint": "/there/a.safetensors"}, "initial_checkpoint is a.safetensors, and  in"),
    ("args.yaml", {"compare": True}, "is of a --compare run"),
    ("results.json", {"decorrelated": True}, "both are decorrelated"),
    ("results.json", {"failure": "diverged"}, r"training failed \(diverged\)"),
    ("results.json", {"changed": [{"steps": 4, "changed": {"lr": ["0.1", "0.2"]}}]}, "gone on with by other arguments"),
    ("results.json", {"final": {"epoch": 1, "steps": 4, "seconds": 1.0}}, "not of one run, or one was cut"),
]


@pytest.mark.parametrize(("file", "values", "words"), OTHER_TWINS)
def test_what_is_not_a_twin_is_refused(
    apart: Path, tmp_path: Path, file: str, values: dict[str, object], words: str
) -> None:
    copy = Path(shutil.copytree(apart / "plain", tmp_path / "plain"))
    given = yaml.safe_load((copy / file).read_text())  # JSON is YAML
    text = yaml.safe_dump(given | values) if file == "args.yaml" else json.dumps(given | values)
    (copy / file).write_text(text)
    with pytest.raises(UserError, match=words):
        staged(apart, tmp_path, "--no-eval", "--twin", str(copy))
    assert not (tmp_path / "staged").exists()


def test_a_twin_is_of_one_run_that_has_none(run: Path, apart: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is of a --compare run, which has its twin"):
        staged(run, tmp_path, "--twin", str(apart / "plain"))
    with pytest.raises(UserError, match="--twin is of one"):
        publish(run, "--no-eval", "--twin", str(apart / "plain"), repo="me")
    with pytest.raises(UserError, match="results.json"):
        staged(apart, tmp_path, "--no-eval", "--twin", str(tmp_path / "nowhere"))


def test_half_precision(run: Path, tmp_path: Path) -> None:
    folder = staged(run, tmp_path, "--half")
    assert load_file(folder / "model.safetensors")["fc.weight"].dtype == torch.float16
    assert json.loads((folder / "results.json").read_text())["dtype"] == "float16"
    assert "half precision" in (folder / "README.md").read_text()


def test_what_cannot_be_published(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run / "plain", copy)
    shutil.copy(run / "args.yaml", copy)
    no_hub = ["--dry-run", str(tmp_path / "out")]
    with pytest.raises(UserError, match="no safetensors file"):
        publish(copy / "resume.pt")
    save_file({"w": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(UserError, match="does not say its architecture"):
        publish(tmp_path / "foreign.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((copy / "last.safetensors").read_bytes()[:500])
    with pytest.raises(UserError, match="cut.safetensors is not a checkpoint"):
        publish(tmp_path / "cut.safetensors")
    with pytest.raises(UserError, match="no checkpoint"):
        publish(tmp_path / "nothing")
    results = json.loads((copy / "results.json").read_text())
    (copy / "results.json").write_text(json.dumps({**results, "failure": "diverged in epoch 2"}))
    with pytest.raises(UserError, match="training failed .diverged in epoch 2."):
        publish(copy)
    (copy / "results.json").write_text("{")
    with pytest.raises(UserError, match="needs the other files of its run .results.json"):
        publish(copy)
    (copy / "results.json").write_text(json.dumps(results))
    args = yaml.safe_load((copy / "args.yaml").read_text())
    for began, words in (({"initial_checkpoint": "somewhere.pth"}, []), ({"pretrained": True}, [])):
        (copy / "args.yaml").write_text(yaml.safe_dump({**args, **began}))
        with pytest.raises(UserError, match="say by --base-model what they are"):
            publish(copy, *no_hub, *words)
        with pytest.raises(UserError, match="whose license decides: say --license"):
            publish(copy, *no_hub, "--base-model", "none")
    (copy / "args.yaml").write_text(yaml.safe_dump({**args, "dataset": "parquet", "data_dir": str(tmp_path / "gone")}))
    with pytest.raises(UserError, match="--data-dir says where the data are"):
        publish(copy, *no_hub)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years")
    with pytest.raises(UserError, match="holds thesis.tex"):
        publish(run / "plain", "--dry-run", str(tmp_path / "full"))


def test_weights_that_timm_would_not_make_the_model_of_are_refused(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    file = copy / "plain" / "last.safetensors"
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    weights = load_file(file)
    del weights["fc.bias"]
    file.unlink()
    save_file(weights, file, metadata)
    with pytest.raises(UserError, match="is damaged, or was replaced"):
        publish(copy / "plain", "--no-eval", "--dry-run", str(tmp_path / "out"))
    results = json.loads((copy / "plain" / "results.json").read_text())
    results["sha256"]["last.safetensors"] = sha256(file)
    (copy / "plain" / "results.json").write_text(json.dumps(results))
    with pytest.raises(UserError, match="does not fit timm's test_resnet"):
        publish(copy / "plain", "--no-eval", "--dry-run", str(tmp_path / "out"))


def test_runs_as_a_module(run: Path, tmp_path: Path) -> None:
    words = [
        "-m",
        "hub.publish",
        str(run / "plain"),
        "--repo-id",
        REPO,
        "--no-eval",
        "--dry-run",
        str(tmp_path / "out"),
    ]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "model.safetensors" in done.stdout, done.stderr


def test_a_change_by_somebody_else_meanwhile_is_not_overwritten(
    run: Path, hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at the repository and the commit: the Hub sees that the commit builds on an older one."""
    from timm_decor.publishing import upload

    publish(run / "plain", "--no-eval")
    look = upload._refuse_other

    def meanwhile(*args: object) -> None:
        look(*args)
        HfApi().upload_file(path_or_fileobj=b"theirs", path_in_repo="README.md", repo_id=REPO)

    monkeypatch.setattr(upload, "_refuse_other", meanwhile)
    with pytest.raises(UserError, match="changed by somebody else meanwhile"):
        publish(run / "decorrelated", "--no-eval")
    assert hub.repo(REPO).files()["README.md"] == b"theirs"


def test_what_was_asked_for_is_not_dropped_in_silence(run: Path, hub: LocalHub) -> None:
    with pytest.raises(UserError, match="nothing to open a pull request on"):
        publish(run / "plain", "--no-eval", "--create-pr")
    publish(run / "plain", "--no-eval")
    with pytest.raises(UserError, match="is public already"):
        publish(run / "plain", "--no-eval", "--private")
    publish(run / "plain", "--no-eval", "--revision", "v1")  # the same files
    assert hub.repo(REPO).files("v1") == hub.repo(REPO).files("main")


def test_the_hub_says_why_it_refuses_a_card(run: Path, hub: LocalHub) -> None:
    hub.fail("POST", "/commit/", 400, times=float("inf"))
    with pytest.raises(UserError, match="the Hub refuses to upload .*400") as error:
        publish(run / "plain", "--no-eval")
    assert "tries again" not in str(error.value)


def test_of_several_models_those_that_can_be_published_are(
    run: Path, hub: LocalHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "runs"
    shutil.copytree(run, copy)
    (copy / "decorrelated" / "resume.pt").write_bytes(b"damaged")
    with pytest.raises(UserError, match="1 of 2 models were not published: me/test_resnet.whiten_digits_r32"):
        publish(copy, "--no-eval", repo="me")
    assert set(hub.repos) == {"me/test_resnet.bp_digits_r32"}
    assert "no R can be had from" in capsys.readouterr().err
    publish(copy / "decorrelated", "--no-eval", "--no-r")
    assert "decor.safetensors" not in hub.repo(REPO).files()


def test_another_epoch_says_so_and_brings_no_r(tmp_path: Path) -> None:
    """A checkpoint that is not the last has its own figures, and R is that of the end of training."""
    folder = train(tmp_path / "run", "--epochs", 2, *DECOR, "--model-ema", "--model-ema-decay", 0.5)
    history = {int(row["epoch"]): row for row in csv_rows(folder)}
    publish(folder / "checkpoint-1.safetensors", "--dry-run", str(tmp_path / "one"), "--no-eval")
    card = (tmp_path / "one" / "README.md").read_text()
    assert f"| **this model** | {float(history[1]['eval_top1']):.2f} |" in card and "after epoch 1 of 2" in card
    assert not (tmp_path / "one" / "decor.safetensors").exists() and "hf_hub_download" not in card
    publish(folder / "last-ema.safetensors", "--dry-run", str(tmp_path / "ema"), "--no-eval")
    card = (tmp_path / "ema" / "README.md").read_text()
    assert f"| **this model** | {float(history[2]['ema_top1']):.2f} |" in card and "averaged (EMA) weights" in card


def csv_rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "summary.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_the_published_model_must_do_what_training_measured(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    record = json.loads((copy / "compare.json").read_text())
    record["sides"][1]["history"][-1]["eval_top1"] += 20
    (copy / "compare.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="other data than training's, or a model that config.json does not describe"):
        publish(copy / "plain", "--dry-run", str(tmp_path / "out"))


def test_a_recipe_that_was_changed_on_the_way_is_not_said_to_repeat_the_run(tmp_path: Path) -> None:
    folder = train(tmp_path / "run", "--epochs", 1)
    publish(folder, "--dry-run", str(tmp_path / "before"))
    assert "`train.py -c recipe.yaml` repeats it" in (tmp_path / "before" / "README.md").read_text()
    train(folder, "--resume", folder, "--epochs", 2, "--lr", "0.01", base=[])
    publish(folder, "--dry-run", str(tmp_path / "after"))
    card = " ".join((tmp_path / "after" / "README.md").read_text().split())
    assert "It was gone on with by other arguments (after 4 updates epochs 1 -> 2, lr 0.05 -> 0.01)" in card
    assert "and does not repeat it" in card and "repeats it" not in card


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("last", "the weights after the last epoch, whether or not the best on these images."),
        ("checkpoint-1", "the weights after epoch 1 of 2."),
        ("best", "picked as the best on these images."),
    ],
)
def test_the_card_says_which_weights_they_are(name: str, words: str, run: Path, tmp_path: Path) -> None:
    publish(run / "plain" / f"{name}.safetensors", "--no-eval", "--dry-run", str(tmp_path / "out"))
    card = " ".join((tmp_path / "out" / "README.md").read_text().split())
    assert words in card
    (row,) = re.findall(r"\| \*\*this model\*\* \|.*?\|\s*(\d+) \| [\d.]+ \|", card)
    assert int(row) == json.loads((tmp_path / "out" / "results.json").read_text())["epoch"]


def test_a_pull_request_is_on_main(run: Path) -> None:
    with pytest.raises(UserError, match="--create-pr opens a pull request on main: leave out --revision"):
        publish(run / "plain", "--create-pr", "--revision", "v2")


def test_a_folder_in_the_place_of_a_hub_name_stays_private(tmp_path: Path) -> None:
    for place in ("/home/me/my secret photos/cats", "~/my secret photos/cats", "../photos/cats"):
        for kind in ("hfds", "hfids"):
            found = known(f"{kind}/{place}", is_folder=False)
            assert (found.name, found.hub_id) == ("cats", "")
    assert known("hfds/me/cats:config", is_folder=False).hub_id == "me/cats"
    assert known("hfids/me/cats", is_folder=False).hub_id == "me/cats"
    trained = object.__new__(Trained)
    for args, name in (
        ({"dataset": "hfds//home/me/my photos/cats"}, "cats"),
        ({"dataset": "hfids/~/cats"}, "cats"),
        ({"dataset": "hfds/me/cats"}, "hfds/me/cats"),
        ({"dataset": "wds/", "data_dir": "https://host/shards/cats/"}, "cats"),
        ({"dataset": "parquet", "data_dir": str(tmp_path / "cats")}, "cats"),
        ({"dataset": None, "data_dir": None}, "digits"),
    ):
        object.__setattr__(trained, "args", args)
        assert trained.data_name == name


def test_pooling_tag_license_and_base_model_are_published(tmp_path: Path) -> None:
    folder = train(tmp_path / "run", "--epochs", 1, "--gp", "max", "--bn-eps", 0.3)
    words = ["--tag", "mine", "--license", "mit", "--base-model", "me/base", "--dry-run", str(tmp_path / "out")]
    publish(folder, *words)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    # with another pooling, or eps, validate.py would find another loss
    assert results["evaluated"]["loss"] == pytest.approx(results["evaluated_in_training"]["loss"], abs=1e-4)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_args"] == {"global_pool": "max"} and config["pretrained_cfg"]["tag"] == "mine"
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.license, card.data.base_model) == ("mit", "me/base")
    assert "starting from [me/base]" in card.text
