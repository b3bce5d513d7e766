"""A user's own loss and trainer: found, traced, trained with, and refused once they have changed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from autosft.profiles.errors import UserError
from autosft.profiles.memory import estimate
from autosft.profiles.memory.trace.shallow_model import load_config
from autosft.profiles.recipe import MemoryEstimate
from autosft.profiles.user_code import UserCode, find, load
from autosft.profiles.user_trainer import find_trainer, overrides
from autosft.scheduler.decide.planner import describe_guess, not_followed
from autosft.studies.trial import Measurement
from autosft.workers.training.train import train
from tests.profiles.memory.models import config_json, device_profile, length_profile, step_recipe
from tests.workers.small import job, make_data, make_model, pinned, plan

pytestmark = pytest.mark.slow

SOURCE = """
import torch
from trl import SFTTrainer

def plain(outputs, labels, num_items_in_batch=None):
    logits, targets = outputs.logits[:, :-1], labels[:, 1:]
    total = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="sum"
    )
    return total / num_items_in_batch

def tripled(outputs, labels, num_items_in_batch=None):
    return 3 * plain(outputs, labels, num_items_in_batch)

def by_value(outputs, labels, num_items_in_batch=None):
    kept = outputs.logits.flatten(0, 1)[torch.nonzero(labels.flatten() >= 0).squeeze(1)]
    return kept.sum()

def counted(outputs, labels, num_items_in_batch=None):
    if int((labels >= 0).sum().item()) == 0:
        return outputs.logits.sum() * 0
    return plain(outputs, labels, num_items_in_batch)

class Tripled(SFTTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return 3 * super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)

class Passing(SFTTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.factor = 1

    def training_step(self, *args, **kwargs):
        return self.factor * super().training_step(*args, **kwargs)

    def create_optimizer(self, model=None):
        return super().create_optimizer(model)

# As guide 2 has it: float masks of the pruned weights, applied by hand.
class Sparse(SFTTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.masks = {n: (p != 0).float() for n, p in self.model.named_parameters() if p.dim() == 2}

    def apply_masks(self, what):
        for name, parameter in self.model.named_parameters():
            if name in self.masks:
                what(parameter).mul_(self.masks[name])

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.apply_masks(lambda one: one.grad)
        return loss

    def create_optimizer(self, model=None):
        optimizer = super().create_optimizer(model)
        optimizer.register_step_post_hook(lambda *_: self.apply_masks(lambda one: one.data))
        return optimizer

class LateMasks(Sparse):
    def __init__(self, *args, **kwargs):
        SFTTrainer.__init__(self, *args, **kwargs)
        self.masks = {}

    def training_step(self, model, inputs, num_items_in_batch=None):
        if not self.masks:
            made = {n: (p != 0).float() for n, p in self.model.named_parameters() if p.dim() == 2}
            self.masks = made
        return super().training_step(model, inputs, num_items_in_batch)

class OwnStep(SFTTrainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        self.accelerator.backward(loss)
        return loss.detach()

class Momentum(SFTTrainer):
    def create_optimizer(self, model=None):
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=self.args.learning_rate, momentum=0.9)
        return self.optimizer

class Hooked(SFTTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for parameter in self.model.parameters():
            parameter.register_hook(lambda gradient: gradient.clamp(-1, 1))

class OwnBatches(SFTTrainer):
    def get_train_dataloader(self):
        return super().get_train_dataloader()

class OwnLoop(SFTTrainer):
    def _inner_training_loop(self, *args, **kwargs):
        return super()._inner_training_loop(*args, **kwargs)

class OwnBoth(SFTTrainer):
    def create_optimizer_and_scheduler(self, num_training_steps):
        pass

class OwnEvaluation(SFTTrainer):
    def evaluate(self, *args, **kwargs):
        return {}

    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs)

NUMBER = 3
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's module, in the current folder."""
    file = tmp_path / "own_code.py"
    file.write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield file
    sys.modules.pop("own_code", None)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def curve(model: Path, data: Path, output: Path, micro_batch: int = 4, **own: object) -> list[float]:
    reports: list[Measurement] = []
    end = train(
        job(
            model,
            data,
            output,
            pinned=pinned(data, **own),
            plan=plan(micro_batch=micro_batch, effective_batch_size=8),
        ),
        reports.append,
        lambda: None,
    )
    assert end.completed
    return [report.loss for report in reports if report.loss is not None and not report.is_evaluation]


def loss(name: str) -> UserCode:
    return find(f"own_code:{name}", flag="--loss")


@pytest.mark.slow
def test_a_loss_like_ours_gives_our_curve_at_any_micro_batch(model: Path, data: Path, tmp_path: Path) -> None:
    ours = curve(model, data, tmp_path / "ours")
    assert curve(model, data, tmp_path / "4", loss=loss("plain")) == pytest.approx(ours, rel=1e-5)
    assert curve(model, data, tmp_path / "2", 2, loss=loss("plain")) == pytest.approx(ours, rel=1e-5)


@pytest.mark.slow
def test_a_loss_and_a_trainer_are_what_is_trained_with(model: Path, data: Path, tmp_path: Path) -> None:
    first = curve(model, data, tmp_path / "ours")[0]
    assert curve(model, data, tmp_path / "loss", loss=loss("tripled"))[0] == pytest.approx(3 * first)
    assert curve(model, data, tmp_path / "class", trainer=loss("Tripled"))[0] == pytest.approx(3 * first)


def test_code_that_has_changed_is_refused(module: Path) -> None:
    began_with = loss("plain")
    module.write_text(SOURCE + "\n# edited")
    with pytest.raises(UserError, match="--loss own_code:plain has changed since the study began"):
        load(began_with, flag="--loss")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("own_code", "is not of the form package.module:name"),
        ("elsewhere:plain", "there is no module elsewhere"),
        ("own_code:missing", "has no class or function missing"),
        ("own_code:NUMBER", "has no class or function NUMBER"),
        ("broken:plain", "importing it failed: ZeroDivisionError"),
    ],
)
def test_what_cannot_be_found_is_one_message(name: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("1 / 0")
    with pytest.raises(UserError, match=words):
        find(name, flag="--loss")


def memory(**own: UserCode) -> MemoryEstimate:
    config = config_json(vocab_size=32_000, hidden_size=64, intermediate_size=176, head_dim=16)
    return estimate(config, replace(step_recipe(), **own), 4, length_profile(400), device_profile())  # type: ignore[arg-type]


def test_full_logits_are_in_the_memory_of_an_own_loss() -> None:
    longest = length_profile(400).longest
    logits_bytes = 4 * longest * 32_000 * 4  # in fp32, as the loss takes them
    assert memory(loss=loss("plain")).need.median_bytes > memory().need.median_bytes + logits_bytes


def test_trainers_that_change_nothing_need_what_trls_loss_needs() -> None:
    """`Tripled` runs trl's own loss too: the rest of a step is the same whoever calls it."""
    expected = memory(trainer=loss("Tripled"))
    for name in ("Passing", "OwnStep"):
        got = memory(trainer=loss(name))
        assert got.untraced == (), name
        assert got.need.median_bytes == pytest.approx(expected.need.median_bytes, rel=0.002), name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Sparse", "LateMasks"])
def test_what_a_trainer_keeps_is_in_its_memory(name: str) -> None:
    config = config_json(vocab_size=4_000, hidden_size=256, intermediate_size=1024, head_dim=64)
    recipe = step_recipe()
    lengths, device = length_profile(64), device_profile()

    def need(name: str) -> int:
        got = estimate(config, replace(recipe, trainer=loss(name)), 1, lengths, device)
        assert got.untraced == ()
        return got.need.median_bytes

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(load_config(config))
    masks_bytes = 4 * sum(parameter.numel() for parameter in model.parameters() if parameter.dim() == 2)
    assert need(name) - need("Passing") == pytest.approx(masks_bytes, rel=0.1)


def test_an_own_optimizer_has_its_own_state() -> None:
    """SGD with momentum keeps one number a weight, AdamW two."""
    two, one = (
        dict(memory(trainer=loss(name)).components)["optimizer state"] for name in ("Passing", "Momentum")
    )
    assert one == pytest.approx(two / 2, rel=0.01)


def test_hooks_of_a_trainer_are_followed_at_every_shape() -> None:
    assert memory(trainer=loss("Hooked")).untraced == ()


@pytest.mark.slow
def test_guide_2s_trainer_keeps_the_zeros_in_training(data: Path, tmp_path: Path) -> None:
    from autosft.profiles.model.sparsity import num_lost
    from tests.workers.training.test_zero_masks import pruned, unstructured

    folder = pruned(tmp_path / "pruned", unstructured)
    reports: list[Measurement] = []
    train(
        job(folder, data, tmp_path / "trial", pinned=pinned(data, trainer=loss("Sparse"))),
        reports.append,
        lambda: None,
    )
    assert reports[-1].checkpoint is not None
    assert num_lost(str(folder), reports[-1].checkpoint) == 0


@pytest.mark.parametrize(
    ("name", "words", "remedy"),
    [
        ("OwnBatches", "overrides get_train_dataloader, but autosft chooses the examples", "--data"),
        ("OwnLoop", "overrides _inner_training_loop, but autosft has to be able to stop", "training_step"),
        ("OwnBoth", "overrides create_optimizer_and_scheduler, but", "create_optimizer and create_scheduler"),
    ],
)
def test_a_trainer_whose_training_could_not_be_exact_is_refused(name: str, words: str, remedy: str) -> None:
    with pytest.raises(UserError, match=words) as refused:
        find_trainer(f"own_code:{name}")
    assert remedy in (refused.value.remedy or "")


def test_overrides_that_are_never_called_are_listed() -> None:
    name = "own_code:OwnEvaluation"
    found = overrides(load(find(name, flag="--trainer"), flag="--trainer"), name=name)
    assert found.followed == ("compute_loss",)
    assert "not called, since autosft does that itself: evaluate" in found.describe()


def test_a_loss_that_cannot_be_followed_is_named_with_its_line() -> None:
    got = memory(loss=loss("by_value"))
    [reason] = got.untraced
    assert reason.startswith("--loss own_code:by_value (line ")
    assert "values of tensors" in got.way_out
    assert "could not follow --loss own_code:by_value" in not_followed(got)
    assert describe_guess(got).startswith("A closed form guesses")


def test_what_a_loss_reads_from_a_tensor_is_named_and_widens_the_bound() -> None:
    plain, reading = memory(loss=loss("plain")), memory(loss=loss("counted"))
    [reason] = reading.untraced
    assert reason.startswith("a number that is read from a tensor in own_code.py line ")
    assert reading.need.upper_bytes > 1.4 * plain.need.upper_bytes
    assert describe_guess(reading).startswith("The trace without it guesses")
