"""Every fast variant against its plain counterpart, and the choice between them."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from nestcli.config import load_config
from nestcli.model import fast
from nestcli.model.attention import Dropout
from nestcli.model.config import NestConfig
from nestcli.model.conformer import ConformerEncoder, DepthwiseStridingSubsampling
from nestcli.model.fast import (
    convolved_by_pieces,
    convolved_whole,
    depthwise_by_taps,
    depthwise_of_image,
    hashed_keep,
    nearest_by_blocks,
    nearest_in_fp64,
    relative_shift_by_padding,
    relative_shift_by_strides,
)
from nestcli.model.quantizer import RandomProjectionQuantizer


def assert_same_gradients(ours: list[torch.Tensor], plain: list[torch.Tensor], tolerance: float) -> None:
    for mine, theirs in zip(ours, plain, strict=True):
        assert (mine - theirs).abs().max() <= tolerance * theirs.abs().max() + 1e-7


@pytest.mark.parametrize(("factor", "frames"), [(8, 1616), (8, 16), (4, 333), (2, 50), (16, 1000)])
def test_subsampling_by_pieces(factor: int, frames: int) -> None:
    torch.manual_seed(factor)
    module = DepthwiseStridingSubsampling(20, 24, 16, factor)
    features = torch.randn(5, frames, 20)
    lengths = torch.tensor([frames, frames - 1, frames // 2, 1, 0])
    wanted = list(module.conv.parameters())
    (plain, plain_lengths), (ours, our_lengths) = (
        convolve(list(module.conv), features, lengths) for convolve in (convolved_whole, convolved_by_pieces)
    )
    assert our_lengths.tolist() == plain_lengths.tolist()
    assert (ours - plain).abs().max() < 1e-6
    weights = torch.randn_like(plain)
    assert_same_gradients(*(torch.autograd.grad((x * weights).sum(), wanted) for x in (ours, plain)), tolerance=1e-5)


def test_subsampling_by_items(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's convolutions number at most 2^31 elements: 16 x 100 x 10 of an item here."""
    module = DepthwiseStridingSubsampling(20, 24, 16, 8)
    features, lengths = torch.randn(5, 200, 20), torch.tensor([200, 199, 70, 1, 0])
    layers, parts = list(module.conv), []
    plain, plain_lengths = convolved_whole(layers, features, lengths)
    monkeypatch.setattr(fast, "on_a_gpu", lambda _: True)
    monkeypatch.setattr(fast, "convolved_whole", lambda *given: parts.append(len(given[1])) or convolved_whole(*given))
    for most, expected in ((16_000 * 5, [5]), (16_000 * 5 - 1, [4, 1]), (40_000, [2, 2, 1]), (10, [1] * 5)):
        monkeypatch.setattr(fast, "_INDEXED", most)
        ours, our_lengths = fast.convolved(layers, features, lengths)
        assert (parts[:], our_lengths.tolist()) == (expected, plain_lengths.tolist())
        assert (ours - plain).abs().max() < 1e-6
        parts.clear()


def test_features_that_are_learned_get_their_gradient() -> None:
    """Pieces give none: a mask embedding that is not frozen needs one."""
    module = DepthwiseStridingSubsampling(20, 24, 16, 8)
    features = torch.randn(2, 100, 20, requires_grad=True)
    module(features, torch.tensor([100, 60]))[0].sum().backward()
    assert features.grad is not None
    assert features.grad[1, :60].abs().max() > 0
    assert not features.grad[1, 60:].any()


@pytest.mark.parametrize(("padding", "bias"), [((4, 4), True), ((8, 0), False), ((3, 5), True)])
@pytest.mark.parametrize("variant", [depthwise_by_taps, depthwise_of_image])
def test_depthwise(variant: Callable[..., torch.Tensor], padding: tuple[int, int], bias: bool) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 30, 6), torch.randn(6, 1, 9)
    bias_M = torch.randn(6) if bias else None
    plain = F.conv1d(F.pad(x.transpose(1, 2), padding), weight, bias_M, groups=6).transpose(1, 2)
    assert (variant(x, weight, bias_M, padding) - plain).abs().max() < 1e-5


@pytest.mark.parametrize("n_frames", [1, 2, 3, 17])
def test_relative_shift(n_frames: int) -> None:
    scores = torch.randn(2, 3, n_frames, 2 * n_frames - 1)
    variants = [fast.relative_shift, relative_shift_by_padding, *([relative_shift_by_strides] if n_frames > 1 else [])]
    for shifted in (variant(scores) for variant in variants):
        for i in range(n_frames):
            for j in range(n_frames):
                assert torch.equal(shifted[..., i, j], scores[..., i, n_frames - 1 - i + j])


def test_the_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    endings = ("_by_pieces", "_whole", "_by_blocks", "_in_fp64", "_by_taps", "_of_image")
    for name in [name for name in vars(fast) if name.endswith(endings)]:
        monkeypatch.setattr(fast, name, lambda *_, name=name: calls.append(name) or torch.zeros(1))
    features, learned = torch.randn(1, 8, 4), torch.randn(1, 8, 4, requires_grad=True)
    lengths, conv = torch.tensor([8]), torch.nn.Conv1d(4, 4, 3, groups=4)
    strided = [torch.nn.Conv2d(1, 4, 3, stride=2, padding=1)]
    fast.convolved(strided, features, lengths)
    fast.convolved(strided, learned, lengths)
    fast.nearest_in_codebook(torch.randn(3, 2), torch.randn(64, 2))
    fast.nearest_in_codebook(torch.randn(3, 2), torch.randn(50, 2))
    fast.depthwise(features, conv, (1, 1))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    fast.convolved(strided, features, lengths)
    fast.depthwise(features, conv, (1, 1))
    assert calls == [
        "convolved_by_pieces", "convolved_whole", "nearest_by_blocks", "nearest_in_fp64", "depthwise_of_image",
        "convolved_whole", "depthwise_by_taps",
    ]  # fmt: skip


def test_tokens_are_those_of_the_smallest_distance() -> None:
    config = NestConfig.from_config(load_config("small", ["model.num_books=3", "model.num_classes=500"])).quantizer
    torch.manual_seed(1)
    quantizer = RandomProjectionQuantizer(config)
    features = torch.randn(2, 80, 8 * 150)
    distances = (quantizer.project(features)[:, :, :, None] - quantizer.codebooks).norm(dim=-1)
    assert torch.equal(quantizer(features), distances.argmin(-1))


def test_blocks_give_the_codes_of_plain_products() -> None:
    """Include codes that occur twice and vectors between two codes, where rounding would decide."""
    torch.manual_seed(3)
    codes = F.normalize(torch.randn(256, 16, dtype=torch.float64), dim=-1)
    codes[200] = codes[7]
    near = F.normalize(codes[:-1] + codes[1:], dim=-1)
    vectors = torch.cat([codes, near, F.normalize(torch.randn(3000, 16, dtype=torch.float64), dim=-1)]).float()
    assert torch.equal(nearest_by_blocks(vectors, codes), nearest_in_fp64(vectors, codes))
    assert nearest_by_blocks(codes[200:201].float(), codes).tolist() == [7]


def key(number: int) -> torch.Tensor:
    return torch.tensor([number], dtype=torch.int32)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_hashed_dropout_keeps_its_share_and_the_mean(p: float) -> None:
    ones = torch.ones(300, 1000, requires_grad=True)
    dropped = Dropout(p, site=3)(ones, key(-5))
    share = float((dropped != 0).float().mean())
    assert share == pytest.approx(1 - p, abs=5 * math.sqrt(p * (1 - p) / ones.numel()) + 1e-12)
    if p < 1:
        assert set(dropped.unique().tolist()) <= {0.0, float(torch.tensor(1.0) / (1 - p))}
    dropped.sum().backward()
    assert torch.equal(ones.grad, dropped.detach())
    assert torch.equal(Dropout(p).eval()(ones, key(1)), ones)


def test_hashed_draws_are_independent_of_each_other() -> None:
    """Correlations of masks of other keys and sites, and of neighbours in one, are those of chance."""
    shape, bound = torch.Size((512, 1024)), 5 / math.sqrt(512 * 1024)
    masks = [hashed_keep(shape, key(number), 0.5) for number in (0, 1, 2, 3, -1, 1 << 20, -(2**31))]
    signs = [mask.double() * 2 - 1 for mask in masks]
    for number, one in enumerate(signs):
        assert abs(one.mean()) < bound
        assert all(abs((one * other).mean()) < bound for other in signs[:number])
        for lag in (1, 2, 3, 16, 64, 1023, 1024, 4096):
            flat = one.flatten()
            assert abs((flat[lag:] * flat[:-lag]).mean()) < bound * 1.01
        assert one.mean(0).abs().max() < 5.5 / math.sqrt(512)
        assert one.mean(1).abs().max() < 5.5 / math.sqrt(1024)


def test_a_draw_is_the_hash_of_an_elements_number() -> None:
    """Compare with one number for each element, in 64 bits; sites far beyond int32 are the same modulo 2^32."""
    shape, number = torch.Size((3, 5, 7, 2)), -123456789
    place = torch.arange(3 * 5 * 7 * 2).view(shape)
    x = ((place + number) * 2654435769) % 2**32
    x = ((x ^ (x >> 16) ^ (number % 2**32)) * 0x7FEB352D) % 2**32
    x = ((x ^ (x >> 15)) * (-2073254261 % 2**32)) % 2**32
    x = x ^ (x >> 16)
    signed = torch.where(x >= 2**31, x - 2**32, x)
    assert torch.equal(hashed_keep(shape, key(number), 0.3), signed >= round(0.3 * 2**32) - 2**31)
    assert [fast._wrapped(each) for each in (5, -5, 2**31, 2**32 + 3, -(2**31) - 1)] == [5, -5, -(2**31), 3, 2**31 - 1]


def test_the_same_key_gives_the_same_draws() -> None:
    x = torch.randn(4, 50, 7)
    assert torch.equal(Dropout(0.3, 1)(x, key(9)), Dropout(0.3, 1)(x, key(9)))
    assert not torch.equal(Dropout(0.3, 1)(x, key(9)), Dropout(0.3, 2)(x, key(9)))


def encoder(*overrides: str) -> ConformerEncoder:
    sizes = ["model.encoder.d_model=32", "model.encoder.n_heads=2", "model.encoder.n_layers=2"]
    config = NestConfig.from_config(load_config("small", [*sizes, *overrides]))
    torch.manual_seed(2)
    return ConformerEncoder(config.encoder)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch.compile has deprecated things of its own
@pytest.mark.parametrize("draws", ["torch", "hash"])
def test_compiled_layers_equal_plain_ones(draws: str) -> None:
    """Compare both in training with dropout and in evaluation, at several sizes: two compilations for each mode.

    One is for batches of one, which the compiler treats apart.
    """
    plain = encoder(f"model.encoder.dropout_draws={draws}")
    compiled = encoder(f"model.encoder.dropout_draws={draws}", "model.encoder.compile=true")
    exact = encoder(f"model.encoder.dropout_draws={draws}").double()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for training in (True, False):
        for batch, frames in ((2, 40), (3, 57), (5, 33), (2, 200), (1, 40), (1, 90)):
            x, lengths = torch.randn(batch, frames, 32, requires_grad=True), torch.randint(1, frames + 1, (batch,))
            found = []
            for module in (plain.train(training), compiled.train(training)):
                torch.manual_seed(frames)
                encoded, _ = module.encode(x, lengths)
                module.zero_grad()
                encoded.square().mean().backward()
                found.append((encoded, [value.grad for value in module.layers.parameters()], torch.rand(1)))
            (theirs, plain_gradients, plain_draw), (ours, our_gradients, our_draw) = found
            torch.manual_seed(frames)
            with torch.no_grad():
                truth, _ = exact.train(training).encode(x.double(), lengths)
            assert (ours - truth).abs().max() < 1e-5
            assert (ours - theirs).abs().max() < 3e-5  # on one thread the plain layers are 1.6e-5 from the truth
            assert_same_gradients(our_gradients, plain_gradients, tolerance=1e-4)
            assert torch.equal(our_draw, plain_draw)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4
