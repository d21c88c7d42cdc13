"""attach in Lightning and in transformers' Trainer: the plain loop's training, or a line that says why not.

docs/frameworks.md says where attach goes; its examples run here. Both frameworks take seconds to import, which is left
to the tests that need them.
"""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from test_attach import batch, net
from torch import Tensor, nn
from torch.utils.data import DataLoader, SequentialSampler
from training_runs import ROOT

import timm_decor
from timm_decor import DecorConfig, DecorHandle

CONFIG = DecorConfig(every=2, sample=1.0)
STEPS = 8
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01),
}
Batch = tuple[Tensor, Tensor]


def decorrelated(dtype: torch.dtype = torch.float64) -> nn.Module:
    return timm_decor.decorrelate(net(dtype), CONFIG)


def batches(count: int = STEPS, dtype: torch.dtype = torch.float64) -> list[Batch]:
    return [batch(seed, dtype=dtype) for seed in range(count)]


def plain_loop(
    opt: str, seen: Sequence[Batch], accumulate: int = 1, clip: float = 0.0
) -> tuple[list[Tensor], list[float]]:
    """The weights after an ordinary loop with `attach`, and the losses on the way."""
    model, losses = decorrelated(), []
    optimizer = OPTIMIZERS[opt](model.parameters())
    handle = timm_decor.attach(model, optimizer)
    for first in range(0, len(seen), accumulate):
        optimizer.zero_grad()
        for x, y in seen[first : first + accumulate]:
            loss = F.cross_entropy(model(x), y)
            (loss / accumulate).backward()
            losses.append(loss.item())
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    assert all(row.refreshes == len(seen) // accumulate // 2 for row in handle.report().rows)
    return weights(model), losses


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def refreshes(handle: DecorHandle) -> set[int]:
    return {row.refreshes for row in handle.report().rows}


def examples(heading: str) -> list[str]:
    """The python blocks of a part of the page, with a model that trains in seconds."""
    page = (ROOT / "docs" / "frameworks.md").read_text(encoding="utf-8")
    part = page.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    small = {
        "decor_resnet18": "decor_test_resnet",
        "ViTConfig(num_labels=10)": "ViTConfig(num_labels=10, image_size=32, patch_size=16, hidden_size=12, "
        "num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)",
        "max_epochs=": "accelerator='cpu', logger=False, enable_progress_bar=False, max_epochs=",
        'report_to="none"': 'report_to="none", use_cpu=True, disable_tqdm=True, per_device_train_batch_size=6',
    }
    code = re.findall(r"```python\n(.*?)```", part, re.DOTALL)
    for name, value in small.items():
        code = [text.replace(name, value) for text in code]
    return code


# Lightning


@pytest.fixture(scope="module")
def pl() -> Any:
    pytest.importorskip("lightning")
    import lightning.pytorch

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    return lightning.pytorch


def classifier(pl: Any, opt: str = "sgd", where: str = "configure_optimizers", by_hand: bool = False, **given: Any):
    """A LightningModule that calls attach in one of its methods, and keeps the losses."""

    class Classifier(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = decorrelated(**given)
            self.automatic_optimization = not by_hand
            self.losses: list[float] = []
            self.optimizer = OPTIMIZERS[opt](self.model.parameters())
            self.attach_in("__init__", self.optimizer)

        def attach_in(self, place: str, optimizer: Any) -> None:
            if place == where:
                self.handle = timm_decor.attach(self.model, optimizer)

        def configure_optimizers(self) -> Any:
            if where != "__init__":
                kept, self.optimizer = self.optimizer, OPTIMIZERS[opt](self.model.parameters())
                self.attach_in("the optimizer of before", kept)
                self.kept = kept
            self.attach_in("configure_optimizers", self.optimizer)
            return self.optimizer

        def on_fit_start(self) -> None:
            self.attach_in("on_fit_start", self.optimizers())

        def on_train_start(self) -> None:
            self.attach_in("on_train_start", self.optimizers())

        def training_step(self, batch: Batch, index: int) -> Tensor:
            loss = F.cross_entropy(self.model(batch[0]), batch[1])
            self.losses.append(loss.item())
            if by_hand:
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
            return loss

    return Classifier()


def fit(pl: Any, module: Any, ckpt_path: Path | None = None, seen: Sequence[Batch] = (), **given: Any) -> Any:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = pl.Trainer(**{"max_epochs": 1, "enable_model_summary": False, **quiet, **given})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on workers
        trainer.fit(module, DataLoader(seen or batches(), batch_size=None), ckpt_path=ckpt_path)
    return trainer


class TestLightning:
    @pytest.mark.parametrize("opt", OPTIMIZERS)
    @pytest.mark.parametrize("by_hand", [False, True], ids=["automatic", "by hand"])
    def test_equals_the_plain_loop(self, pl: Any, opt: str, by_hand: bool) -> None:
        module = classifier(pl, opt, by_hand=by_hand)
        fit(pl, module)
        expected, losses = plain_loop(opt, batches())
        assert module.losses == losses and same(weights(module.model), expected) and module.handle.step == STEPS

    @pytest.mark.parametrize("opt", OPTIMIZERS)
    def test_accumulation_and_clipping(self, pl: Any, opt: str) -> None:
        module = classifier(pl, opt)
        fit(pl, module, accumulate_grad_batches=2, gradient_clip_val=0.1)
        expected, losses = plain_loop(opt, batches(), accumulate=2, clip=0.1)
        assert module.losses == losses and same(weights(module.model), expected) and module.handle.step == STEPS // 2

    @pytest.mark.parametrize("where", ["configure_optimizers", "on_fit_start", "on_train_start"])
    def test_a_resumed_run_goes_on_with_r(self, pl: Any, where: str, tmp_path: Path) -> None:
        whole, half, again = (classifier(pl, "adamw", where) for _ in range(3))
        fit(pl, half).save_checkpoint(tmp_path / "run.ckpt")
        kept = torch.load(tmp_path / "run.ckpt", weights_only=True)
        assert {name.split(".")[0] for name in kept["state_dict"]} == {"model"}
        if where == "on_train_start":  # when the optimizer has loaded its state: R would begin anew
            with pytest.raises(ValueError, match="loaded a decorrelated run's state before attach"):
                fit(pl, again, tmp_path / "run.ckpt", max_epochs=2)
            return
        fit(pl, whole, max_epochs=2)
        fit(pl, again, tmp_path / "run.ckpt", max_epochs=2)
        assert again.handle.step == 2 * STEPS and same(weights(again.model), weights(whole.model))

    def test_a_second_fit_without_detach_is_refused(self, pl: Any) -> None:
        module = classifier(pl)
        fit(pl, module)
        with pytest.raises(ValueError, match=r"^already attached: call detach\(\)"):
            fit(pl, module)

    @pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "bf16-true", "64-true"])
    def test_precisions_and_weights_that_are_cast_after_attach(self, pl: Any, precision: str) -> None:
        module = classifier(pl, where="__init__", dtype=torch.float32)
        fit(pl, module, seen=batches(dtype=torch.float32), precision=precision)
        assert module.handle.step == STEPS and refreshes(module.handle) == {STEPS // 2}
        dtype = {"64-true": torch.float64, "bf16-true": torch.bfloat16}.get(precision, torch.float32)
        assert {p.dtype for p in module.model.parameters()} == {dtype}
        assert all(p.isfinite().all() for p in module.model.parameters())

    def test_an_optimizer_that_lightning_does_not_get(self, pl: Any, caplog: pytest.LogCaptureFixture) -> None:
        module = classifier(pl, where="the optimizer of before")
        fit(pl, module)
        assert module.handle.step == 0 and caplog.text.count("step() of the attached SGD is not called") == 1

    def test_averages(self, pl: Any) -> None:
        callbacks = [pl.callbacks.StochasticWeightAveraging(0.01, swa_epoch_start=1)]
        if hasattr(pl.callbacks, "WeightAveraging"):  # since Lightning 2.6
            callbacks.append(pl.callbacks.WeightAveraging())
        for callback in callbacks:
            module = classifier(pl)
            fit(pl, module, callbacks=[callback], max_epochs=2)
            assert module.handle.step == 2 * STEPS and refreshes(module.handle) == {STEPS}
            assert module.losses[:STEPS] == plain_loop("sgd", batches())[1]

    @pytest.mark.parametrize("when", ["before", "behind"])
    def test_fabric(self, pl: Any, when: str) -> None:
        from lightning.fabric import Fabric

        fabric, model, losses = Fabric(accelerator="cpu", devices=1), decorrelated(), []
        optimizer = OPTIMIZERS["sgd"](model.parameters())
        handle = timm_decor.attach(model, optimizer) if when == "before" else None
        model, optimizer = fabric.setup(model, optimizer)
        handle = handle or timm_decor.attach(model, optimizer)
        for x, y in batches():
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            fabric.backward(loss)
            optimizer.step()
            losses.append(loss.item())
        assert losses == plain_loop("sgd", batches())[1] and handle.step == STEPS

    def test_under_ddp(self, pl: Any) -> None:
        """Of one process; tests/test_distributed.py has two, which agree on R."""
        module, kept = classifier(pl), dict(os.environ)
        try:
            trainer = fit(pl, module, strategy="ddp", devices=1, use_distributed_sampler=False)
            assert isinstance(trainer.strategy, pl.strategies.DDPStrategy) and dist.is_initialized()
        finally:
            os.environ.clear()
            os.environ.update(kept)
            dist.destroy_process_group()
        expected, losses = plain_loop("sgd", batches())
        assert module.losses == losses and same(weights(module.model), expected)

    def test_the_page(self, pl: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        images = [(torch.randn(6, 3, 32, 32), torch.arange(6)) for _ in range(3)]
        names: dict[str, Any] = {"loader": DataLoader(images, batch_size=None)}
        for code in examples("Lightning"):
            exec(compile(code, "docs/frameworks.md", "exec"), names)
        assert names["classifier"].handle.step == 3 and names["again"].handle.step == 6
        names["trainer"].fit_loop.max_epochs = 2
        names["trainer"].fit(names["classifier"], names["loader"])  # it detaches by itself
        saved = torch.load("run.ckpt", weights_only=True)["state_dict"]
        import timm

        plain = timm.create_model("test_resnet", num_classes=10)
        plain.load_state_dict({name.removeprefix("model."): value for name, value in saved.items()})


# transformers


@pytest.fixture(scope="module")
def hf() -> Any:
    return pytest.importorskip("transformers")


class ForTrainer(nn.Module):
    """The page's wrapper, which keeps the losses and what it saw."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.model = decorrelated(dtype)
        self.losses: list[float] = []
        self.seen: list[Batch] = []

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.model(pixel_values)
        loss = F.cross_entropy(logits, labels)
        self.losses.append(loss.item())
        self.seen.append((pixel_values, labels))
        return {"loss": loss, "logits": logits}


def rows(dtype: torch.dtype = torch.float64) -> list[dict[str, Tensor]]:
    pairs = [(x, y) for images, labels in batches(dtype=dtype) for x, y in zip(images, labels, strict=True)]
    return [{"pixel_values": x, "labels": y} for x, y in pairs]


def arguments(hf: Any, folder: Path, **given: Any) -> Any:
    defaults = {"num_train_epochs": 1, "per_device_train_batch_size": 6, "max_grad_norm": 0.0, "use_cpu": True}
    silent = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no"}
    return hf.TrainingArguments(str(folder), **{**defaults, **silent, **given})


def constant(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)


def trainer_of(hf: Any) -> type:
    class DecorTrainer(hf.Trainer):  # type: ignore[misc, name-defined]
        def create_optimizer(self, *args: Any) -> torch.optim.Optimizer:
            is_new = self.optimizer is None
            optimizer = super().create_optimizer(*args)
            if is_new:
                self.handle = timm_decor.attach(self.model, optimizer)
            return optimizer

        def _get_train_sampler(self, *args: Any) -> Any:
            return SequentialSampler(rows())  # a resumed Trainer shuffles otherwise than one that was not interrupted

    return DecorTrainer


class TestTransformers:
    @pytest.mark.parametrize("opt", OPTIMIZERS)
    @pytest.mark.parametrize("accumulate", [1, 2])
    def test_equals_the_plain_loop(self, hf: Any, opt: str, accumulate: int, tmp_path: Path) -> None:
        model, clip = ForTrainer(), 0.0 if accumulate == 1 else 0.1
        optimizer = OPTIMIZERS[opt](model.parameters())
        handle = timm_decor.attach(model, optimizer)
        given = arguments(hf, tmp_path, gradient_accumulation_steps=accumulate, max_grad_norm=clip)
        hf.Trainer(model, given, train_dataset=rows(), optimizers=(optimizer, constant(optimizer))).train()
        expected, losses = plain_loop(opt, model.seen, accumulate, clip)
        assert model.losses == losses and same(weights(model), expected)
        assert handle.step == STEPS // accumulate and len(losses) == STEPS

    def test_a_resumed_run_goes_on_with_r(self, hf: Any, tmp_path: Path) -> None:
        kind = trainer_of(hf)
        models = [ForTrainer() for _ in range(3)]
        given = arguments(hf, tmp_path / "run", num_train_epochs=2, save_strategy="epoch")
        whole, again, late = (kind(model, given, train_dataset=rows()) for model in models)
        whole.train()
        assert refreshes(whole.handle) == {STEPS}
        end = weights(models[0])
        kept = tmp_path / "run" / f"checkpoint-{STEPS}"
        net().load_state_dict(
            {name.removeprefix("model."): value for name, value in load_file(kept / "model.safetensors").items()}
        )
        again.train(resume_from_checkpoint=str(kept))
        assert again.handle.step == 2 * STEPS and same(weights(models[1]), end)
        whole.train()  # with the same optimizer, which stays attached
        assert whole.handle.step == 4 * STEPS

        class Late(hf.TrainerCallback):  # type: ignore[misc, name-defined]
            def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, **_: Any) -> None:
                timm_decor.attach(model, optimizer)

        late = hf.Trainer(models[2], given, train_dataset=rows(), callbacks=[Late()])
        with pytest.raises(ValueError, match="loaded a decorrelated run's state before attach"):
            late.train(resume_from_checkpoint=str(kept))

    def test_an_optimizer_that_the_trainer_does_not_get(
        self, hf: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Its own is a fused AdamW, which does not count its writes."""
        model = ForTrainer()
        optimizer = OPTIMIZERS["sgd"](model.parameters())
        handle = timm_decor.attach(model, optimizer)
        hf.Trainer(model, arguments(hf, tmp_path), train_dataset=rows()).train()
        assert handle.step == 0 and caplog.text.count("step() of the attached SGD is not called") == 1

    def test_a_model_for_each_training_and_mixed_precision(self, hf: Any, tmp_path: Path) -> None:
        def make() -> nn.Module:
            return ForTrainer(torch.float32)

        trainer = trainer_of(hf)(
            args=arguments(hf, tmp_path, bf16=True), model_init=make, train_dataset=rows(torch.float32)
        )
        handles = []
        for _ in range(2):
            trainer.train()
            handles.append(trainer.handle)
        assert handles[0] is not handles[1]
        assert [(handle.step, refreshes(handle)) for handle in handles] == [(STEPS, {STEPS // 2})] * 2

    def test_the_page(self, hf: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        images = [{"pixel_values": torch.randn(3, 32, 32), "labels": i % 10} for i in range(18)]
        names: dict[str, Any] = {"dataset": images}
        first, second, third = examples("transformers' Trainer")
        exec(compile(first, "docs/frameworks.md", "exec"), names)
        assert names["handle"].step == 3 and len(names["handle"].names) > 10
        exec(compile(second, "docs/frameworks.md", "exec"), names)
        assert names["trainer"].handle.step == 3 and len(names["trainer"].handle.names) >= 8
        plain = hf.ViTForImageClassification.from_pretrained("plain-vit")
        assert not [m for m in plain.modules() if "timm_decor" in type(m).__module__]
        assert same(weights(plain), weights(names["vit"]))
        exec(compile(third, "docs/frameworks.md", "exec"), names)
        state = torch.load("vit/checkpoint-6/optimizer.pt", weights_only=True)
        assert state["timm_decor"]["step"] == 5  # the first run ended at a rate of zero, and so the second begins
