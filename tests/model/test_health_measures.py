"""Measures of health against their definitions, written out in NumPy or known in closed form."""

import math

import numpy as np
import pytest
import torch

from nestcli.model.health import count_codes, dead_codes, effective_rank, perplexity, unigram_baseline


def counts(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int64)


def test_codes_are_counted_for_each_codebook() -> None:
    counted = counts([0, 0, 1], [0, 0, 0])
    count_codes(counted, torch.tensor([[0, 2], [0, 1], [1, 2]]))
    assert counted.tolist() == [[2, 1, 1], [0, 1, 2]]
    count_codes(counted, torch.empty(0, 2, dtype=torch.int64))  # a batch without a masked token
    count_codes(counted, torch.tensor([[-1, 0]]))
    assert counted.tolist() == [[2, 1, 1], [1, 1, 2]]


def test_perplexity_is_the_number_of_codes_in_even_use() -> None:
    assert float(perplexity(counts([5, 5, 5, 5, 0, 0]))) == pytest.approx(4.0)
    assert float(perplexity(counts([7, 0, 0, 0]))) == pytest.approx(1.0)
    assert float(perplexity(counts([7, 0, 0, 0], [1, 1, 1, 1]))) == pytest.approx(2.5)  # the mean of the codebooks
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert float(perplexity(counts([3, 1]))) == pytest.approx(math.exp(entropy))
    assert float(dead_codes(counts([7, 0, 0, 0], [1, 1, 1, 0]))) == 2.0


def test_the_unigram_baseline_guesses_by_what_was_seen_before() -> None:
    loss, accuracy = unigram_baseline(counts([0, 0, 0, 0]), counts([4, 0, 0, 1]))
    assert float(loss) == pytest.approx(math.log(4))  # nothing seen: an even guess
    loss, accuracy = unigram_baseline(counts([6, 1, 1, 0]), counts([2, 0, 1, 1]))
    expected = -(2 * math.log(7 / 12) + math.log(2 / 12) + math.log(1 / 12)) / 4
    assert float(loss) == pytest.approx(expected)
    assert float(accuracy) == pytest.approx(0.5)
    assert math.isnan(float(unigram_baseline(counts([6, 1]), counts([0, 0]))[0]))


def test_the_baseline_of_many_tokens_is_their_entropy() -> None:
    shares = torch.tensor([0.5, 0.25, 0.125, 0.125])
    seen = (shares * 8_000_000).long()[None]
    loss, _ = unigram_baseline(seen, (shares * 8000).long()[None])
    assert float(loss) == pytest.approx(float(torch.special.entr(shares).sum()), abs=1e-5)


def numpys_rank(frames: np.ndarray) -> float:
    """Roy and Vetterli's definition."""
    values = np.linalg.svd(frames - frames.mean(0), compute_uv=False)
    shares = values / values.sum()
    shares = shares[shares > 0]
    return float(np.exp(-(shares * np.log(shares)).sum()))


def test_the_effective_rank_is_that_of_the_valid_frames() -> None:
    torch.manual_seed(0)
    encoded = torch.randn(3, 40, 12) @ torch.randn(12, 12) + 5
    lengths = torch.tensor([40, 7, 23])
    valid = torch.cat([encoded[item, :length] for item, length in enumerate(lengths)])
    encoded[1, 7:] = float("nan")  # padding may hold anything
    ours = effective_rank(encoded, lengths)
    assert float(ours) == pytest.approx(numpys_rank(valid.double().numpy()), rel=1e-9)
    assert 1 < float(ours) < 12


def test_the_effective_rank_of_known_spectra() -> None:
    torch.manual_seed(0)
    lengths = torch.tensor([500, 500])
    assert float(effective_rank(torch.randn(2, 500, 8), lengths)) == pytest.approx(8, rel=0.01)
    assert float(effective_rank(torch.randn(2, 500, 8) @ torch.randn(8, 64), lengths)) < 8
    line = torch.randn(2, 500, 1) * torch.randn(64) + torch.randn(64)
    assert float(effective_rank(line, lengths)) == pytest.approx(1, abs=0.01)
    constant = torch.randn(64).expand(2, 500, 64) * (1 + 1e-7 * torch.randn(2, 500, 64))
    assert float(effective_rank(constant, lengths)) == pytest.approx(1)
    assert float(effective_rank(torch.zeros(2, 5, 4), torch.tensor([0, 0]))) == pytest.approx(1)
    assert math.isnan(float(effective_rank(torch.full((2, 5, 4), torch.nan), torch.tensor([5, 2]))))


def test_a_large_batch_is_looked_at_in_places() -> None:
    torch.manual_seed(0)
    encoded, lengths = torch.randn(16, 1000, 8), torch.full((16,), 1000)
    assert float(effective_rank(encoded, lengths, most_frames=300)) == pytest.approx(8, rel=0.05)
    assert float(effective_rank(encoded.bfloat16(), lengths)) == pytest.approx(8, rel=0.01)
