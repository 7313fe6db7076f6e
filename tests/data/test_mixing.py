"""Mixing: NeMo's numbers from NeMo's seeds, and the improvements that are the default."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from conftest import Golden, assert_close
from nestcli.data.dataset import NoiseBatch, mix_one_speaker_or_noise, mix_speakers_and_noise
from nestcli.data.mixing import AugmentationConfig, Mixture, _energy, _random_split, mix_into

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
    """Plain reference: rebuild the mixture from the recorded pieces, sample by sample."""
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


# ---- fast paths beside plain references ------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 7, 1023, 1024, 1025, 50_000])
def test_energy_is_the_mean_of_squares(length: int) -> None:
    sound = (np.random.default_rng(length).standard_normal(length) * 0.1 - 0.3).astype(np.float32)
    plain = math.fsum(float(sample) ** 2 for sample in sound) / length
    assert _energy(sound) == pytest.approx(plain, rel=2e-7)
    assert _energy(sound[::-1][:0]) == 0


@pytest.mark.parametrize(("total", "n_parts"), [(3, 4), (5, 2), (40, 5)])
def test_random_split_at_once_is_distributed_as_sample_by_sample(total: int, n_parts: int) -> None:
    """Compare the number of parts and the sizes of the first and the last in 1,500 splits of either kind."""
    draws = 1500
    at_once = [_random_split(total, n_parts, random.Random(f"a{n}"), always_draw=False) for n in range(draws)]
    one_by_one = [_random_split(total, n_parts, random.Random(f"b{n}"), always_draw=True) for n in range(draws)]
    assert all(sum(parts) == total and min(parts) > 0 for parts in at_once)
    for measure in (len, lambda parts: parts[0], lambda parts: parts[-1], lambda parts: parts[0] ** 2):
        ours, theirs = ([measure(parts) for parts in side] for side in (at_once, one_by_one))
        error = math.sqrt((np.var(ours) + np.var(theirs)) / draws)
        assert abs(np.mean(ours) - np.mean(theirs)) < 4 * error + 1e-9


def test_one_utterance_is_mixed_as_in_a_batch_of_it_and_others() -> None:
    for seed in range(20):
        batch = random_batch(seed, lengths=(400, 400, 400), noise_len=400)
        sounds = [row.numpy() for row in batch.audio]
        record: list[Mixture | None] = []
        mixed = mix_speakers_and_noise(batch, FULL, random.Random(seed), None, record)
        noise = batch.noise[0].numpy()
        added, noisy, done = mix_into(sounds, FULL, random.Random(seed), lambda _, count: noise[:count])  # noqa: B023
        assert done == record[0]
        assert np.array_equal(added, mixed.noise[0].numpy())
        assert np.array_equal(noisy, mixed.noisy_audio[0].numpy())


# ---- odd sounds ------------------------------------------------------------------------------------------------------

SHAPES = {
    "silent": np.zeros(500), "direct current": np.full(500, -0.02), "one sample": np.full(1, 0.5), "none": np.zeros(0),
    "longer than the speech": np.sin(np.arange(5000)), "not a number": np.full(500, np.nan),
    "infinite": np.full(500, np.inf), "too large to square": np.full(500, 1e30),
}  # fmt: skip


@pytest.mark.parametrize("mix", [mix_speakers_and_noise, mix_one_speaker_or_noise])
@pytest.mark.parametrize("shape", SHAPES)
def test_noise_of_any_kind(mix, shape: str) -> None:
    """Noise is mixed in at the requested ratio, or not at all; no NaN gets in."""
    batch, noise = random_batch(), SHAPES[shape].astype(np.float32)
    record: list[Mixture | None] = []
    config = replace(FULL, noise_ratio=1.0, max_num_segments=2)
    ours = mix(batch, config, random.Random(0), lambda _, count: noise[:count], record)
    assert ours.noisy_audio.isfinite().all()
    assert ours.noise.isfinite().all()
    assert all(done is not None for done in record)
    usable = shape in ("direct current", "one sample", "longer than the speech")
    for done in record:
        assert done.mode == ("speech" if shape in ("silent", "none") else "noise")
        assert (done.gain > 0) == (usable or done.mode == "speech")


@pytest.mark.parametrize("mix", [mix_speakers_and_noise, mix_one_speaker_or_noise])
def test_silent_speech_gets_nothing(mix) -> None:
    batch = random_batch()
    audio = batch.audio.clone()
    audio[1] = 0
    silent = replace(batch, audio=audio, noisy_audio=audio)
    ours = mix(silent, replace(FULL, noise_ratio=1.0), random.Random(0))
    assert not ours.noisy_audio[1].any()


@pytest.mark.parametrize("mix", [mix_speakers_and_noise, mix_one_speaker_or_noise])
@pytest.mark.parametrize("rate", [0.0, 0.4, 1.0])
def test_a_batch_of_one_gets_noise(mix, rate: float) -> None:
    batch = random_batch(lengths=(300,), noise_len=300)
    config = replace(FULL, noise_ratio=0.0, min_mix_rate=rate, max_mix_rate=rate)
    record: list[Mixture | None] = []
    ours = mix(batch, config, random.Random(0), None, record)
    assert record[0] is not None
    assert record[0].mode == "noise"
    assert int((ours.noise != 0).sum()) == max(1, int(300 * rate))


@pytest.mark.parametrize("mix", [mix_speakers_and_noise, mix_one_speaker_or_noise])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("prob", [0.0, 1.0])
def test_what_comes_out_shares_no_memory_with_what_came_in(mix, exact: bool, prob: float) -> None:
    batch, untouched = random_batch(), random_batch()
    ours = mix(batch, replace(FULL, prob=prob, nemo_exact=exact), random.Random(1))
    ours.noise.fill_(7)
    ours.noisy_audio.fill_(7)
    for name in ("audio", "audio_len", "noise", "noise_len"):
        assert torch.equal(getattr(batch, name), getattr(untouched, name))


@pytest.mark.parametrize("mix", [mix_speakers_and_noise, mix_one_speaker_or_noise])
def test_random_settings_never_fail(mix) -> None:
    for seed in range(200):
        choose = random.Random(seed)
        low = choose.random()
        config = AugmentationConfig(
            prob=choose.choice([0.5, 1.0]), noise_ratio=choose.random(), min_r_speech=-5, max_r_speech=5,
            min_r_noise=-5, max_r_noise=20, min_mix_rate=low, max_mix_rate=choose.uniform(low, 1),
            max_num_segments=choose.randint(1, 30), max_num_speakers=choose.randint(1, 6),
        )  # fmt: skip
        lengths = tuple(choose.randint(1, 60) for _ in range(choose.randint(1, 5)))
        ours = mix(random_batch(seed, lengths, noise_len=choose.randint(0, max(lengths))), config, choose)
        assert ours.noisy_audio.isfinite().all()
        for row, length in zip(ours.noise, ours.audio_len, strict=True):
            assert not row[length:].any()
