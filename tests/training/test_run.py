"""Runs: the files they leave, exact resumes, and the contents of a checkpoint that NeMo users expect."""

import json
from pathlib import Path

import pytest
import torch

from conftest import tiny_config
from nestcli.checkpoint.lightning import (
    AtomicCheckpointIO,
    config_of_content,
    load_lightning_checkpoint,
)
from nestcli.checkpoint.load import load_checkpoint
from nestcli.config import load_config
from nestcli.data.datamodule import NestDataModule
from nestcli.errors import CheckpointError, ConfigError, DataError, RunFailedError
from nestcli.model.config import NestConfig
from nestcli.model.nest import NestModel
from nestcli.training.monitor.metrics import TIMED, StepReport
from nestcli.training.run import Pretraining, RunResult, _memory_explained
from nestcli.training.settings import Length


class Recorder:
    def __init__(self) -> None:
        self.steps: list[StepReport] = []
        self.validations: list[tuple[int, float, float]] = []
        self.ended = False
        self.notes: list[str] = []

    def step(self, report: StepReport) -> None:
        self.steps.append(report)

    def validation(self, step: int, loss: float, accuracy: float) -> None:
        self.validations.append((step, loss, accuracy))

    def note(self, message: str) -> None:
        self.notes.append(message)

    def finished(self) -> None:
        self.ended = True


def train(corpus: dict[str, Path], folder: Path, *overrides: str) -> tuple[RunResult, Recorder]:
    recorder = Recorder()
    config = tiny_config(corpus, f"exp_manager.exp_dir={folder}", "exp_manager.name=run", *overrides)
    return Pretraining(config, recorder).fit(), recorder


def lines(result: RunResult) -> list[dict]:
    return [json.loads(line) for line in result.metrics.read_text().splitlines()]


def without_time(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if key not in TIMED} for row in rows]


def test_a_run_leaves_checkpoints_metrics_and_curves(corpus: dict[str, Path], tmp_path: Path) -> None:
    result, recorder = train(corpus, tmp_path, "trainer.max_steps=7", "trainer.val_check_interval=3")
    assert result.step == 7
    assert [step for step, _, _ in recorder.validations] == [3, 6]
    assert [report.step for report in recorder.steps] == list(range(1, 8))
    assert recorder.ended
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert len(names) == 4
    assert names.pop() == "run.nemo"
    before, last = sorted((name for name in names if "last" in name), key=lambda name: name.split("step=")[1])
    [best] = set(names) - {before, last}
    assert before.endswith("-step=6-last.ckpt")
    assert best.startswith("SSL-NEST-FastConformer--val_loss=")
    assert last.endswith("-step=7-last.ckpt")
    assert result.best is not None
    assert result.last is not None
    assert (result.best.name, result.last.name) == (best, last)
    rows = lines(result)
    assert [row["step"] for row in rows] == list(range(1, 8))
    assert all(row.keys() >= {"step", "train_loss", "lr", "audio_seconds", "seconds"} for row in rows)
    assert [row["step"] for row in rows if "val_loss" in row] == [3, 6]
    assert rows[0]["lr"] == rows[1]["lr"] < rows[2]["lr"]
    assert rows[-1]["audio_seconds"] > rows[0]["audio_seconds"] > 4
    assert list((tmp_path / "run" / "tensorboard").glob("events.out.tfevents.*"))
    assert (tmp_path / "run" / "config.yaml").is_file()


def test_a_checkpoint_has_nemos_names_its_configuration_and_no_code(corpus: dict[str, Path], tmp_path: Path) -> None:
    result, _ = train(corpus, tmp_path, "trainer.max_steps=2", "trainer.val_check_interval=2")
    assert result.last is not None
    content = load_lightning_checkpoint(result.last)
    config = config_of_content(content, str(result.last), ["model.encoder.dropout=0.5"])
    assert config.model.encoder.dropout == 0.5
    model = NestModel(NestConfig.from_config(config))
    model.load_state_dict(content["state_dict"], strict=True)
    assert next(iter(content["state_dict"])) == "preprocessor.featurizer.window"
    [group] = content["optimizer_states"][0]["param_groups"]
    assert len(group["params"]) == len(list(model.parameters()))


def test_the_nemo_file_is_that_of_the_best_model(corpus: dict[str, Path], tmp_path: Path) -> None:
    # warm-up that makes the model worse after step 1: the best one is not the newest
    grows = ["trainer.max_steps=3", "trainer.val_check_interval=1", "model.optim.lr=40.0"]
    result, recorder = train(corpus, tmp_path, *grows)
    losses = [loss for _, loss, _ in recorder.validations]
    assert min(losses) < losses[-1]
    assert result.nemo == tmp_path / "run" / "checkpoints" / "run.nemo"
    assert result.best is not None
    kept, best = load_checkpoint(result.nemo), load_checkpoint(result.best)
    assert all(torch.equal(kept.state_dict[name], best.state_dict[name]) for name in best.state_dict)
    assert kept.config.model.train_ds.manifest_filepath == str(corpus["train"])


@pytest.mark.parametrize(
    "override", ["exp_manager.checkpoint_callback_params.always_save_nemo=false", "model.mask_position=post_conv"]
)
def test_a_run_without_a_nemo_file(corpus: dict[str, Path], tmp_path: Path, override: str) -> None:
    result, _ = train(corpus, tmp_path, "trainer.max_steps=1", "trainer.val_check_interval=1", override)
    assert result.nemo is None
    assert not list(tmp_path.rglob("*.nemo"))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_run_gives_the_same_losses_to_the_last_bit(
    corpus: dict[str, Path], tmp_path: Path, accumulate: int
) -> None:
    common = ["trainer.val_check_interval=2", f"trainer.accumulate_grad_batches={accumulate}"]
    whole, _ = train(corpus, tmp_path / "whole", "trainer.max_steps=9", *common)
    for steps in (4, 5, 9):  # in the middle of the second epoch, after a validation, to the end
        parts, _ = train(corpus, tmp_path / "parts", f"trainer.max_steps={steps}", *common)
    assert without_time(lines(parts)) == without_time(lines(whole))
    assert whole.last is not None
    assert parts.last is not None
    ours, theirs = (load_lightning_checkpoint(path)["state_dict"] for path in (parts.last, whole.last))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    lasts = (tmp_path / "parts" / "run" / "checkpoints").glob("*-last.ckpt")
    assert sorted(path.name.split("step=")[1] for path in lasts) == ["8-last.ckpt", "9-last.ckpt"]


def test_metrics_of_a_killed_run_beyond_its_checkpoint_are_taken_back(corpus: dict[str, Path], tmp_path: Path) -> None:
    result, _ = train(corpus, tmp_path, "trainer.max_steps=3", "trainer.val_check_interval=3")
    rows = result.metrics.read_text()
    result.metrics.write_text(rows + '{"step": 4, "train_loss": 1.0}\n{"step": 5, "tra')
    again, _ = train(corpus, tmp_path, "trainer.max_steps=5", "trainer.val_check_interval=3")
    assert [row["step"] for row in lines(again)] == [1, 2, 3, 4, 5]
    assert again.metrics.read_text().startswith(rows)


def test_a_short_epoch_does_not_keep_validation_from_coming(corpus: dict[str, Path], tmp_path: Path) -> None:
    _, recorder = train(corpus, tmp_path, "trainer.max_steps=8", "trainer.val_check_interval=4")
    assert [step for step, _, _ in recorder.validations] == [4, 8]  # an epoch has 3 batches


def test_without_validation_the_newest_checkpoint_is_kept(corpus: dict[str, Path], tmp_path: Path) -> None:
    result, _ = train(corpus, tmp_path, "trainer.max_steps=4", "model.validation_ds.manifest_filepath=null")
    assert result.val_loss is None
    assert result.last is not None
    assert result.last.name == "run--step=4-last.ckpt"
    assert result.nemo is not None
    kept, last = load_checkpoint(result.nemo).state_dict, load_checkpoint(result.last).state_dict
    assert all(torch.equal(kept[name], last[name]) for name in last)


def test_validation_weights_batches_by_their_selected_tokens(
    corpus: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nestcli.training.run.check_masks", lambda *_: None)  # which refuses a run that masks nothing
    common = ["trainer.max_steps=1", "trainer.val_check_interval=1"]
    pairs, _ = train(corpus, tmp_path / "pairs", *common)
    singles, _ = train(corpus, tmp_path / "singles", *common, "model.masking.block_size=4000")
    assert pairs.val_loss is not None
    assert 1 < pairs.val_loss < 10
    assert singles.val_loss is None or singles.val_loss != singles.val_loss  # nothing to predict: no mean


def test_a_dry_run_tries_a_batch_and_writes_nothing(corpus: dict[str, Path], tmp_path: Path) -> None:
    config = tiny_config(corpus, f"exp_manager.exp_dir={tmp_path / 'new'}", "model.train_ds.num_workers=1")
    trial = Pretraining(config, Recorder()).dry_run()
    assert trial.loss == pytest.approx(3.5, abs=1.0)
    assert trial.gradient_norm > 0
    assert 0 < trial.masked_share < 1
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.accelerator=tpu", "trainer.accelerator"),
        ("trainer.precision=12", "trainer.precision: 12 is not one of"),
        ("trainer.precision=16-true", "trainer.precision: '16-true' is not one of"),
        ("trainer.devices=null", "trainer.devices: None is not of type"),
        ("trainer.devices=0,1", "a list such as [0,1]"),
        ("trainer.max_steps=10k", "trainer.max_steps: '10k' is not of type"),
        ("trainer.val_check_interval=0", "trainer.val_check_interval: 0 must be from 1 to"),
        ("trainer.accumulate_grad_batches=0", "trainer.accumulate_grad_batches: 0 must be from 1 to 1,048,576"),
        ("trainer.gradient_clip_algorithm=foo", "trainer.gradient_clip_algorithm: 'foo' must be norm or value"),
        (
            "exp_manager.checkpoint_callback_params.mode=foo",
            "checkpoint_callback_params.mode: 'foo' must be min or max",
        ),
        ("exp_manager.checkpoint_callback_params.monitor=val_los", "'val_los' is not logged"),
        ("model.train_ds.batch_size=abc", "model.train_ds.batch_size: 'abc' is not of type int"),
        ("model.train_ds.max_duration=long", "model.train_ds.max_duration: 'long' is not of type"),
        (
            "model.validation_ds.batch_augmentor.prob=7",
            "model.validation_ds.batch_augmentor.prob: 7.0 must be from 0 to 1",
        ),
        ("model.quantizer.feat_in=64", "model.quantizer.feat_in is 64, but the other blocks make it 80"),
        ("model.encoder.n_layers=0", "n_layers: 0 must be from 1 to 512"),
        ("model.encoder.att_context_size=[a,b]", "att_context_size: 'a' is not of type int"),
        ("model.optim.betas=[0.9,x]", "betas: 'x' is not of type float"),
        ("seed=abc", "seed: 'abc' must be an integer"),
        ("exp_manager.resume_ignore_no_checkpoint=false", "contains no checkpoint"),
        ("model.optim.name=sgd", "only adamw is"),
        ("model.optim.sched.name=Cosine", "only NoamAnnealing is"),
    ],
)
def test_settings_that_cannot_be_run(corpus: dict[str, Path], tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        train(corpus, tmp_path, "trainer.max_steps=1", override)
    if "resume_ignore" not in override:
        with pytest.raises(ConfigError):
            Pretraining(tiny_config(corpus, f"exp_manager.exp_dir={tmp_path}", override), Recorder()).dry_run()
    assert message in str(raised.value)


@pytest.mark.parametrize("precision", ["bf16", "bf16-mixed", "bf16-true"])
def test_tokens_do_not_depend_on_the_precision(corpus: dict[str, Path], tmp_path: Path, precision: str) -> None:
    setting = f"trainer.precision={precision}"
    result, _ = train(corpus, tmp_path, "trainer.max_steps=2", "trainer.val_check_interval=1", setting)
    full, _ = train(corpus, tmp_path / "full", "trainer.max_steps=2", "trainer.val_check_interval=1")
    assert result.val_loss == pytest.approx(full.val_loss, rel=0.02)
    assert result.val_loss != full.val_loss
    seen = []
    for name in (setting, "trainer.precision=32"):
        module = Pretraining(tiny_config(corpus, name), Recorder()).module
        batch = NestDataModule(tiny_config(corpus)).train_batch(0, 0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled="true" not in name and "32" not in name):
            features, _ = module.model.eval().preprocessor(batch.audio, batch.audio_len)
            seen.append(module.model.quantizer(features))
        assert features.dtype == torch.float32
    assert torch.equal(*seen)


def test_a_damaged_or_foreign_checkpoint_is_refused(tmp_path: Path) -> None:
    broken = tmp_path / "x-last.ckpt"
    broken.write_bytes(b"PK\x03\x04 not a checkpoint")
    with pytest.raises(CheckpointError, match=r"x-last\.ckpt cannot be read as a checkpoint"):
        load_lightning_checkpoint(broken)
    torch.save({"weights": 1}, broken)
    with pytest.raises(CheckpointError, match="no state_dict"):
        load_lightning_checkpoint(broken)
    torch.save({"state_dict": Recorder()}, broken)
    with pytest.raises(CheckpointError, match="name code to call"):
        load_lightning_checkpoint(broken)
    with pytest.raises(CheckpointError, match="name code to call"):
        AtomicCheckpointIO().load_checkpoint(broken, weights_only=False)  # whatever Lightning asks for


def test_a_write_that_fails_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run-last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"state_dict": {}, "global_step": 1}, path)

    def full(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nestcli.files.os.fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        AtomicCheckpointIO().save_checkpoint({"state_dict": {}, "global_step": 2}, path)
    assert load_lightning_checkpoint(path)["global_step"] == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["run-last.ckpt"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], Length(500000, 1, 100, 2500)),
        (["trainer.max_steps=-1", "trainer.max_epochs=3"], Length(300, 1, 100, 2500)),
        (["trainer.max_epochs=3", "trainer.accumulate_grad_batches=8"], Length(37, 8, 100, 2500)),
        (["trainer.max_steps=-1"], Length(None, 1, 100, 2500)),
        (["trainer.val_check_interval=0.25"], Length(500000, 1, 100, 25)),
        (["trainer.val_check_interval=1.0", "trainer.limit_train_batches=10"], Length(500000, 1, 10, 10)),
    ],
)
def test_the_length_of_a_run(overrides: list[str], expected: Length) -> None:
    assert Length.of(load_config("small", overrides).trainer, 100) == expected


def test_another_model_does_not_go_on_with_this_run(corpus: dict[str, Path], tmp_path: Path) -> None:
    first, _ = train(corpus, tmp_path, "trainer.max_steps=1")
    before = (first.folder / "config.yaml").read_text()
    with pytest.raises(ConfigError, match=r"model\.encoder\.d_model is 16 there and 32 here.*exp_manager\.name"):
        train(corpus, tmp_path, "trainer.max_steps=2", "model.encoder.d_model=32")
    assert (first.folder / "config.yaml").read_text() == before


def test_a_run_is_not_overwritten_by_a_new_one(corpus: dict[str, Path], tmp_path: Path) -> None:
    first, _ = train(corpus, tmp_path, "trainer.max_steps=1")
    with pytest.raises(ConfigError, match=r"already contains a run.*exp_manager\.name"):
        train(corpus, tmp_path, "trainer.max_steps=1", "exp_manager.resume_if_exists=false")
    assert first.last is not None
    assert first.last.is_file()


def test_validation_within_the_first_accumulation(corpus: dict[str, Path], tmp_path: Path) -> None:
    result, recorder = train(
        corpus, tmp_path, "trainer.max_steps=2", "trainer.accumulate_grad_batches=4", "trainer.val_check_interval=2"
    )
    assert [step for step, _, _ in recorder.validations] == [0, 1, 1, 2]
    assert [row["step"] for row in lines(result)] == [0, 1, 2]


def test_an_end_before_the_first_step_is_refused(corpus: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"fewer than the trainer\.accumulate_grad_batches=8"):
        train(corpus, tmp_path, "trainer.max_epochs=1", "trainer.accumulate_grad_batches=8")


def rotten_manifest(corpus: dict[str, Path], folder: Path, *, all_lines: bool = False) -> Path:
    """The training manifest, with the first file missing, or with no file that is audio."""
    (folder / "broken.wav").write_bytes(b"RIFF, but not really")
    rows = [json.loads(line) for line in corpus["train"].read_text().splitlines()]
    for row in rows if all_lines else rows[:1]:
        row["audio_filepath"] = str(folder / ("broken.wav" if all_lines else "gone.wav"))
    manifest = folder / "train.json"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return manifest


def test_the_display_ends_when_training_fails(corpus: dict[str, Path], tmp_path: Path) -> None:
    manifest = rotten_manifest(corpus, tmp_path, all_lines=True)
    recorder = Recorder()
    config = tiny_config(
        corpus, f"exp_manager.exp_dir={tmp_path}", f"model.train_ds.manifest_filepath={manifest}", "trainer.max_steps=9"
    )
    with pytest.raises(DataError, match=r"broken\.wav"):
        Pretraining(config, recorder).fit()
    assert recorder.ended


def test_training_goes_on_without_a_file_that_is_gone(corpus: dict[str, Path], tmp_path: Path) -> None:
    manifest = rotten_manifest(corpus, tmp_path)
    result, recorder = train(corpus, tmp_path, f"model.train_ds.manifest_filepath={manifest}", "trainer.max_steps=9")
    assert result.step == 9
    assert [note for note in recorder.notes if "gone.wav" in note] == recorder.notes[:1]
    assert result.skipped == [row["skipped"] for row in lines(result)][-1] == 3  # once in each of three epochs


BUCKETED = (
    "model.train_ds.use_lhotse=true", "model.train_ds.batch_size=null", "model.train_ds.batch_duration=5",
    "model.train_ds.num_buckets=3",
)  # fmt: skip


@pytest.mark.parametrize("words", [BUCKETED, ("model.train_ds.batch_size=5", "model.train_ds.drop_last=false")])
def test_a_resumed_run_sees_the_batches_that_it_would_have_seen(
    corpus: dict[str, Path], tmp_path: Path, words: tuple[str, ...]
) -> None:
    words = (*words, "trainer.val_check_interval=5")
    whole, _ = train(corpus, tmp_path / "whole", *words, "trainer.max_steps=12")
    train(corpus, tmp_path / "parts", *words, "trainer.max_steps=7")
    resumed, recorder = train(
        corpus, tmp_path / "parts", *words, "trainer.max_steps=12", "model.train_ds.num_workers=1"
    )
    assert [row["train_loss"] for row in lines(resumed)] == [row["train_loss"] for row in lines(whole)]
    assert not recorder.notes


def test_a_run_on_changed_data_begins_an_epoch_and_says_so(corpus: dict[str, Path], tmp_path: Path) -> None:
    train(corpus, tmp_path, "trainer.max_steps=4")
    _, recorder = train(corpus, tmp_path, "trainer.max_steps=5", "model.train_ds.min_duration=1.25")
    assert recorder.notes == [
        "The configuration changes from step 5 on: model.train_ds.min_duration is 1.25, was 1.0. "
        "The previous one is kept as config-to-step-4.yaml.",
        "The training data or their batches are not those of the checkpoint: "
        "the run continues with epoch 2 from its beginning.",
    ]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore"),
            "GPU's memory is full: CUDA out",
        ),
        (
            torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors"),
            "driver is out of memory: .*pin_mem",
        ),
        (RuntimeError("CUDA error: out of memory"), "model.train_ds.num_workers or model.train_ds.batch_size"),
    ],
)
def test_memory_that_is_full_is_explained(error: Exception, message: str) -> None:
    with pytest.raises(RunFailedError, match=message), _memory_explained():
        raise error


def test_other_errors_of_a_gpu_are_no_lack_of_memory() -> None:
    with pytest.raises(torch.AcceleratorError, match="illegal memory access"), _memory_explained():
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
