"""The quantizer fitted to speech: on stacks whose clusters are known."""

import pytest
import torch
from torch.nn.functional import normalize

from nestcli.model.config import QuantizerConfig
from nestcli.model.fitted_codes import fit_codes, spherical_centroids
from nestcli.model.quantizer import RandomProjectionQuantizer

FEATURES, STEPS = 6, 4


def quantizer(**changed: int) -> RandomProjectionQuantizer:
    values = {"code_dim": 5, "num_books": 2, "num_classes": 8, **changed}
    return RandomProjectionQuantizer(
        QuantizerConfig(FEATURES, **values, dist_fn="l2", freeze=True, squeeze_single=False, combine_time_steps=STEPS)  # type: ignore[arg-type]
    )


def clusters(count: int, spread: float = 0.02) -> tuple[torch.Tensor, torch.Tensor]:
    """Stacks (S, W) around eight directions of a space of five dimensions, and the direction of each."""
    drawn = torch.Generator().manual_seed(3)
    basis_EW = torch.linalg.qr(torch.randn(FEATURES * STEPS, 5, generator=drawn))[0].T
    centres_CW = normalize(torch.randn(8, 5, generator=drawn), dim=1) @ basis_EW
    kind_S = torch.arange(count) % 8
    noise_SW = torch.randn(count, FEATURES * STEPS, generator=drawn)
    return 9 * (centres_CW[kind_S] + spread * noise_SW), kind_S


def features(stacks_SW: torch.Tensor) -> torch.Tensor:
    """The same frames as the quantizer receives them: (1, D, T)."""
    return stacks_SW.reshape(1, -1, FEATURES).transpose(1, 2)


def purity(tokens_S: torch.Tensor, kind_S: torch.Tensor) -> float:
    """Share of tokens whose kind is the most frequent one of their code."""
    counts = torch.zeros(int(tokens_S.max()) + 1, 8).index_put_((tokens_S, kind_S), torch.ones(len(kind_S)), True)
    return float(counts.max(1).values.sum()) / len(kind_S)


def test_codes_keep_the_clusters_of_the_data_apart() -> None:
    stacks_SW, kind_S = clusters(800, spread=0.1)
    fitted, random = quantizer(num_classes=16), quantizer(num_classes=16)
    fit_codes(fitted, stacks_SW)
    for book in range(2):
        ours, theirs = (purity(each(features(stacks_SW))[0, :, book], kind_S) for each in (fitted, random))
        assert ours > 0.85
        assert theirs < 0.75
    assert (fitted.codebooks.norm(dim=-1) - 1).abs().max() < 1e-6
    assert fitted.codebooks.dtype == torch.float64
    assert not fitted.codebooks.requires_grad


def test_all_codes_are_used_about_evenly_and_random_ones_are_not() -> None:
    drawn = torch.Generator().manual_seed(0)
    stacks_SW = torch.randn(4_000, FEATURES * STEPS, generator=drawn) * torch.logspace(0, -2, FEATURES * STEPS)
    fitted, random = quantizer(num_classes=64), quantizer(num_classes=64)
    fit_codes(fitted, stacks_SW)

    def perplexity(of: RandomProjectionQuantizer) -> float:
        shares_C = torch.bincount(of(features(stacks_SW))[0, :, 0], minlength=64) / 4_000
        return float(torch.exp(torch.special.entr(shares_C).sum()))

    assert perplexity(fitted) > 50 > perplexity(random)


def test_codebooks_differ_and_the_same_data_gives_the_same_codes() -> None:
    stacks_SW, _ = clusters(600, spread=0.3)
    first, second = quantizer(), quantizer()
    for each in (first, second):
        fit_codes(each, stacks_SW)
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    assert not torch.allclose(first.codebooks[0], first.codebooks[1])
    projections_GEW = first.proj.weight.view(2, 5, -1)
    assert not torch.allclose(projections_GEW[0], projections_GEW[1])


def test_a_centroid_without_stacks_starts_again() -> None:
    same = normalize(torch.ones(50, 3), dim=1)
    apart = normalize(torch.tensor([[1.0, 0, 0], [0, 1.0, 0]]), dim=1)
    centroids_CE = spherical_centroids(torch.cat([same, apart]), 3, seed=1)
    assert centroids_CE.isfinite().all()
    assert (centroids_CE.norm(dim=1) - 1).abs().max() < 1e-5


def test_what_cannot_be_fitted_is_refused() -> None:
    with pytest.raises(ValueError, match="79 tokens are too few for 8 codes: give 80"):
        fit_codes(quantizer(), clusters(79)[0])
    with pytest.raises(ValueError, match="code_dim=25 is more than the 24 features of a token"):
        fit_codes(quantizer(code_dim=25), clusters(100)[0])
