"""Mixing: NeMo's numbers from NeMo's seeds, and what is better by default."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from conftest import Golden, assert_close
from nestcli.data.augmentation import (
    AugmentationConfig,
    Mixture,
    mix_one_speaker_or_noise,
    mix_speakers_and_noise,
)
from nestcli.data.batch import NoiseBatch
from nestcli.data.mixing import _random_split

GOLDEN = Golden("augmentation")
FULL = AugmentationConfig(
    prob=1.0, noise_ratio=0.5, min_r_speech=-5.0, max_r_speech=5.0, min_r_noise=-5.0, max_r_noise=20.0,
    min_mix_rate=0.3, max_mix_rate=0.9, max_num_segments=4, max_num_speakers=3,
)  # fmt: skip


def random_batch(seed: int = 0, lengths: tuple[int, ...] = (400, 300, 250), noise_len: int = 180) -> NoiseBatch:
    generator = torch.Generator().manual_seed(seed)
    audio, noise = (torch.randn(len(lengths), max(lengths), generator=generator) * 0.1 for _ in range(2))
    audio_len = torch.tensor(lengths)
    audio[torch.arange(max(lengths)) >= audio_len[:, None]] = 0
    noise[:, noise_len:] = 0
    return NoiseBatch(audio, audio_len, noise, torch.full((len(lengths),), noise_len), audio, audio_len)


@pytest.mark.parametrize("number", range(len(GOLDEN.metadata["cases"])))
def test_nemo_exact_gives_the_recorded_batches(number: int) -> None:
    case = GOLDEN.metadata["cases"][number]
    given = GOLDEN.under(f"{number:02d}.in.")
    defaults = {
        **{"prob": 0.0, "noise_ratio": 0.0, "min_mix_rate": 0.0, "max_mix_rate": 1.0},
        **{"min_r_speech": -5.0, "max_r_speech": 5.0, "min_r_noise": -5.0, "max_r_noise": 20.0},
    }
    config = AugmentationConfig(**{**defaults, **case["arguments"]}, nemo_exact=True)
    batch = NoiseBatch(**given, noisy_audio=given["audio"], noisy_audio_len=given["audio_len"])
    mix = mix_speakers_and_noise if case["class"].startswith("Multi") else mix_one_speaker_or_noise
    rng = random.Random(case["seed"])
    ours = mix(batch, config, rng)
    theirs = GOLDEN.under(f"{number:02d}.out.")
    assert torch.equal(ours.noise_len, theirs["noise_len"])
    assert torch.equal(ours.noisy_audio_len, theirs["noisy_audio_len"])
    assert_close(ours.noise, theirs["noise"], 1e-6, "noise")
    assert_close(ours.noisy_audio, theirs["noisy_audio"], 1e-6, "noisy audio")
    assert rng.random() == case["next_draw"], "another number of draws than NeMo"


@pytest.mark.parametrize("n_parts", [1, 2, 5])
def test_random_split_draws_what_choices_draws(n_parts: int) -> None:
    ours, theirs = random.Random(3), random.Random(3)
    seen: dict[int, int] = {}
    for choice in theirs.choices(range(n_parts), k=1234):
        seen[choice] = seen.get(choice, 0) + 1
    assert _random_split(1234, n_parts, ours, always_draw=True) == list(seen.values())
    assert ours.random() == theirs.random()


@pytest.mark.parametrize("mix", [mix_speakers_and_noise, mix_one_speaker_or_noise])
def test_an_item_that_is_not_augmented_stays_clean_and_whole(mix) -> None:
    batch = random_batch()
    ours = mix(batch, replace(FULL, prob=0.0), random.Random(0))
    assert torch.equal(ours.noisy_audio, batch.audio)
    assert torch.equal(ours.noisy_audio_len, batch.audio_len)
    assert not ours.noise.any()


@pytest.mark.parametrize("mix", [mix_speakers_and_noise, mix_one_speaker_or_noise])
@pytest.mark.parametrize("seed", range(20))
def test_what_came_in_is_not_changed_and_lengths_hold(mix, seed: int) -> None:
    batch, untouched = random_batch(seed), random_batch(seed)
    ours = mix(batch, FULL, random.Random(seed))
    for name in ("audio", "audio_len", "noise", "noise_len"):
        assert torch.equal(getattr(batch, name), getattr(untouched, name))
    assert torch.equal(ours.noisy_audio_len, batch.audio_len)
    for row, length in zip(ours.noisy_audio, batch.audio_len, strict=True):
        assert not row[length:].any(), "something was mixed into the padding"
    assert ours.noisy_audio.abs().max() <= 1


@pytest.mark.parametrize("seed", range(20))
def test_noise_that_is_asked_for_gives_what_noise_in_the_batch_gives(seed: int) -> None:
    batch = random_batch(seed)
    asked: list[int] = []

    def noise_of(item: int, count: int) -> np.ndarray:
        asked.append(item)
        assert count <= batch.audio_len[item]
        return batch.noise[item, : min(count, int(batch.noise_len[item]))].numpy()

    config = replace(FULL, prob=0.7)
    without = replace(batch, noise=torch.zeros(3, 0), noise_len=torch.zeros(3, dtype=torch.int64))
    ours = mix_speakers_and_noise(without, config, random.Random(seed), noise_of)
    theirs = mix_speakers_and_noise(batch, config, random.Random(seed))
    assert torch.equal(ours.noisy_audio, theirs.noisy_audio)
    assert len(asked) == len(set(asked)) < 3 or seed


@pytest.mark.parametrize("mix", [mix_speakers_and_noise, mix_one_speaker_or_noise])
@pytest.mark.parametrize("loud", [1.0, 6.0])
@pytest.mark.parametrize("seed", range(10))
def test_the_record_says_what_was_done(mix, loud: float, seed: int) -> None:
    """A plain reference: put the pieces together again from the record, sample by sample."""
    batch = random_batch(seed)
    batch = replace(batch, audio=batch.audio * loud)
    record: list[Mixture | None] = []
    ours = mix(batch, replace(FULL, prob=0.7), random.Random(seed), None, record)
    assert len(record) == 3
    for item, done in enumerate(record):
        length = int(batch.audio_len[item])
        if done is None:
            assert torch.equal(ours.noisy_audio[item], batch.audio[item])
            continue
        noise = np.zeros(len(batch.audio[item]))
        for segment in done.segments:
            assert (segment.source is None) == (done.mode == "noise")
            row, count = (
                (batch.noise[item], batch.noise_len[item])
                if segment.source is None
                else (batch.audio[segment.source], batch.audio_len[segment.source])
            )
            sound = row[: int(count)].numpy()
            for place in range(segment.length):
                noise[segment.start + place] = sound[(segment.source_start + place) % len(sound)] * done.gain
        assert np.abs(noise - ours.noise[item].numpy()).max() < 1e-6
        noisy = (batch.audio[item].numpy() + noise) * done.scale
        assert np.abs(noisy - ours.noisy_audio[item].numpy()).max() < 1e-6
        energies = [(signal[:length] ** 2).mean() for signal in (batch.audio[item].numpy(), noise)]
        if mix is mix_speakers_and_noise:
            assert 10 * np.log10(energies[0] / energies[1]) == pytest.approx(done.ratio_db, abs=1e-3)


def test_noise_shorter_than_its_place_is_repeated() -> None:
    batch = random_batch(noise_len=7)
    ours = mix_speakers_and_noise(batch, replace(FULL, noise_ratio=1.0, max_num_segments=1), random.Random(0))
    mixed = ours.noise[0][ours.noise[0] != 0]
    assert torch.equal(mixed[:7], mixed[7:14])


@pytest.mark.parametrize("mix", [mix_speakers_and_noise, mix_one_speaker_or_noise])
@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_mix_rates_at_the_ends(mix, rate: float) -> None:
    config = replace(FULL, min_mix_rate=rate, max_mix_rate=rate, noise_ratio=1.0, max_num_segments=1)
    ours = mix(random_batch(noise_len=400), config, random.Random(0))
    mixed = (ours.noise != 0).sum(dim=1)
    assert (mixed <= ours.audio_len).all()
    assert (mixed > 0).all()
    assert rate == 0 or torch.equal(mixed, ours.audio_len)


@pytest.mark.parametrize("ratio_db", [-5.0, 0.0, 12.0])
@pytest.mark.parametrize("noise_ratio", [0.0, 1.0])
def test_the_ratio_over_the_item_is_the_one_asked_for(ratio_db: float, noise_ratio: float) -> None:
    config = replace(
        FULL, noise_ratio=noise_ratio, min_r_speech=ratio_db, max_r_speech=ratio_db, min_r_noise=ratio_db,
        max_r_noise=ratio_db,
    )  # fmt: skip
    ours = mix_speakers_and_noise(random_batch(), config, random.Random(1))
    for item, length in enumerate(ours.audio_len):
        energies = [(signal[item, :length] ** 2).mean() for signal in (ours.audio, ours.noise)]
        assert float(10 * torch.log10(energies[0] / energies[1])) == pytest.approx(ratio_db, abs=1e-3)


def test_more_segments_than_samples_do_not_run_out() -> None:
    config = replace(FULL, min_mix_rate=0.02, max_mix_rate=0.02, min_num_segments=8, max_num_segments=8)
    mix_speakers_and_noise(random_batch(lengths=(250, 100)), config, random.Random(0))


def test_noise_mode_without_noise_falls_back_to_speech() -> None:
    batch = random_batch(noise_len=0)
    ours = mix_speakers_and_noise(batch, replace(FULL, noise_ratio=1.0), random.Random(0))
    assert ours.noise.any(dim=1).all()
    alone = random_batch(lengths=(300,), noise_len=0)
    ours = mix_speakers_and_noise(alone, replace(FULL, noise_ratio=1.0), random.Random(0))
    assert torch.equal(ours.noisy_audio, alone.audio)


def test_a_mixture_beyond_full_scale_is_turned_down() -> None:
    batch = random_batch()
    loud = replace(batch, audio=batch.audio * 6)
    ours = mix_speakers_and_noise(loud, replace(FULL, min_r_speech=-5.0, max_r_speech=-5.0), random.Random(0))
    peaks = ours.noisy_audio.abs().amax(dim=1)
    assert peaks.max() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("key", "value"), [("prob", 1.5), ("min_mix_rate", 0.95), ("max_r_noise", -9.0), ("min_num_segments", 0)]
)
def test_settings_out_of_range_name_the_key(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=key):
        replace(FULL, **{key: value})
