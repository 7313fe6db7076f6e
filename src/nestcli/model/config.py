"""Every block of the model's YAML, checked. Sizes have no defaults here: they come from the YAML.

`nestcli.config.section` builds a block; where a check raises ValueError, it raises ConfigError with the full key.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from operator import attrgetter

from omegaconf import DictConfig

from nestcli.checks import one_of, short, within
from nestcli.config import section
from nestcli.errors import ConfigError

PER_FEATURE, ALL_FEATURES = "per_feature", "all_features"


@dataclass(frozen=True)
class PreprocessorConfig:
    """The `model.preprocessor` block. Times in seconds, rates in Hz."""

    sample_rate: int
    window_size: float
    window_stride: float
    n_fft: int
    features: int
    dither: float
    pad_to: int
    pad_value: float
    normalize: str
    window: str
    log: bool
    frame_splicing: int
    nemo_exact: bool = False

    def __post_init__(self) -> None:
        within(self, 1000, 1 << 20, "sample_rate")
        within(self, 1, 1, "frame_splicing")
        within(self, 0, 10, "window_size", "window_stride", above=True)
        within(self, 2, 1 << 14, "n_fft")
        within(self, 1, 1 << 10, "features")
        within(self, 0, 1, "dither")
        within(self, 0, 1 << 16, "pad_to")
        within(self, -1e4, 1e4, "pad_value")
        one_of(self, "normalize", PER_FEATURE, ALL_FEATURES)
        one_of(self, "window", "hann")
        one_of(self, "log", True)
        if not 2 <= self.window_length <= self.n_fft:
            raise ValueError(f"window_size: {self.window_length} samples must be from 2 to n_fft={self.n_fft}.")
        if self.hop_length < 1:
            raise ValueError(f"window_stride: {self.window_stride} s are less than one sample.")

    @property
    def window_length(self) -> int:
        return round(self.window_size * self.sample_rate)

    @property
    def hop_length(self) -> int:
        return round(self.window_stride * self.sample_rate)


@dataclass(frozen=True)
class MaskingConfig:
    """The `model.masking` block. `block_size` in frames."""

    feat_in: int
    block_size: int
    mask_prob: float
    freeze: bool
    allow_overlap: bool
    mask_value: float | None = None
    max_mask_ratio: float | None = None

    def __post_init__(self) -> None:
        within(self, 1, 1 << 16, "feat_in", "block_size")
        within(self, 0, 1, "mask_prob")
        within(self, -1e4, 1e4, "mask_value")
        within(self, 0, 1, "max_mask_ratio", above=True)


@dataclass(frozen=True)
class QuantizerConfig:
    """The `model.quantizer` block. `combine_time_steps` is the number of frames in a token."""

    feat_in: int
    code_dim: int
    num_books: int
    num_classes: int
    dist_fn: str
    freeze: bool
    squeeze_single: bool
    combine_time_steps: int
    init: str = "random"  # or kmeans: fitted to the training data before the first step

    def __post_init__(self) -> None:
        one_of(self, "init", "random", "kmeans")
        within(self, 1, 1 << 16, "feat_in")
        within(self, 1, 1 << 14, "code_dim")
        within(self, 1, 1 << 12, "num_books")
        within(self, 2, 1 << 24, "num_classes")
        within(self, 1, 64, "combine_time_steps")
        one_of(self, "dist_fn", "l2", "cosine")


@dataclass(frozen=True)
class EncoderConfig:
    """The `model.encoder` block."""

    feat_in: int
    feat_out: int
    n_layers: int
    d_model: int
    use_bias: bool
    subsampling: str
    subsampling_factor: int
    subsampling_conv_channels: int
    causal_downsampling: bool
    ff_expansion_factor: int
    self_attention_model: str
    n_heads: int
    att_context_size: tuple[int, ...]
    att_context_style: str
    xscaling: bool
    untie_biases: bool
    conv_kernel_size: int
    conv_norm_type: str
    conv_context_size: tuple[int, ...] | str | None
    dropout: float
    dropout_pre_encoder: float
    dropout_emb: float
    dropout_att: float
    stochastic_depth_drop_prob: float
    stochastic_depth_mode: str
    stochastic_depth_start_layer: int
    pos_emb_max_len: int = 5000  # for NeMo's encoder only; our table of positions grows as needed
    use_pytorch_sdpa: bool = False
    conv_norm_ignore_padding: bool = False
    backend: str = "nest"  # the code that trains: nest or nemo; the model is the same, all else uses nest
    compile: bool = False  # compile the layers with torch.compile
    dropout_draws: str | None = None  # torch: its generator, as in NeMo; hash: cheap draws; None: hash if compiled

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_names()
        if self.subsampling_factor & (self.subsampling_factor - 1):
            raise ValueError(f"subsampling_factor: {self.subsampling_factor} must be a power of 2.")
        if self.d_model % self.n_heads or self.d_model % 2:
            raise ValueError(f"d_model: {self.d_model} must be even and a multiple of n_heads={self.n_heads}.")
        if self.conv_kernel_size % 2 == 0:
            raise ValueError(f"conv_kernel_size: {self.conv_kernel_size} must be odd.")
        if len(self.att_context_size) != 2:
            raise ValueError(f"att_context_size: {list(self.att_context_size)} must be [left, right].")
        self._check_chunks()
        if self.stochastic_depth_drop_prob and not 1 <= self.stochastic_depth_start_layer <= self.n_layers:
            raise ValueError(f"stochastic_depth_start_layer: it must be from 1 to n_layers={self.n_layers}.")
        if self.backend == "nemo" and (self.compile or self.dropout_draws == "hash"):
            raise ValueError("backend: NeMo's encoder has no compile and no dropout_draws=hash. Leave them out.")
        self._check_convolution()

    def _check_names(self) -> None:
        one_of(self, "subsampling", "dw_striding")
        one_of(self, "causal_downsampling", False)
        one_of(self, "self_attention_model", "rel_pos")
        one_of(self, "att_context_style", "regular", "chunked_limited")
        one_of(self, "stochastic_depth_mode", "linear", "uniform")
        one_of(self, "backend", "nest", "nemo")
        one_of(self, "dropout_draws", None, "torch", "hash")

    def _check_chunks(self) -> None:
        """Check the context against chunks as NeMo defines them: right + 1 frames each, whole chunks to the left."""
        left, right = self.att_context_size
        if self.att_context_style != "chunked_limited":
            return
        if right < 0:
            raise ValueError(
                f"att_context_size: with chunked_limited the right context of {[left, right]} must be at least 0: "
                "it sets the length of a chunk. Or set att_context_style to regular."
            )
        if left > 0 and left % (right + 1):
            raise ValueError(
                f"att_context_size: with chunked_limited the left context of {[left, right]} must be a multiple of "
                f"a chunk's {right + 1} frames (the right context + 1), or -1."
            )

    def _check_numbers(self) -> None:
        within(self, 1, 1 << 16, "feat_in", "d_model", "n_heads")
        within(self, 1, 512, "n_layers", "stochastic_depth_start_layer")
        within(self, 2, 64, "subsampling_factor")
        within(self, 1, 64, "ff_expansion_factor")
        within(self, 1, 1 << 12, "conv_kernel_size")
        within(self, 1, 1 << 20, "pos_emb_max_len")
        within(self, -1, 1 << 16, "att_context_size")
        within(self, 0, 1, "dropout", "dropout_pre_encoder", "dropout_emb", "dropout_att", below=True)
        within(self, 0, 1, "stochastic_depth_drop_prob", below=True)
        for key, largest in (("feat_out", 1 << 16), ("subsampling_conv_channels", 1 << 14)):
            if getattr(self, key) != -1:  # -1 stands for d_model
                within(self, 1, largest, key)
        if not isinstance(self.conv_context_size, str):
            within(self, 0, 1 << 12, "conv_context_size")

    def _check_convolution(self) -> None:
        if self.conv_norm_type not in ("batch_norm", "layer_norm") and not self.conv_norm_groups:
            raise ValueError(f"conv_norm_type: {self.conv_norm_type!r}: use batch_norm, layer_norm or group_normN.")
        if self.conv_norm_groups and self.d_model % self.conv_norm_groups:
            raise ValueError(f"conv_norm_type: {self.conv_norm_groups} groups must divide d_model={self.d_model}.")
        if self.conv_norm_ignore_padding and self.conv_norm_type != "batch_norm":
            raise ValueError("conv_norm_ignore_padding: only conv_norm_type=batch_norm can leave out padding.")
        if self.conv_norm_ignore_padding and self.backend == "nemo":
            raise ValueError("conv_norm_ignore_padding: NeMo's encoder cannot do that. Set model.encoder.backend=nest.")
        if len(self.conv_padding) != 2 or sum(self.conv_padding) + 1 != self.conv_kernel_size:
            raise ValueError(f"conv_context_size: {self.conv_context_size} must add up to conv_kernel_size - 1.")

    @property
    def width_out(self) -> int:
        """Width of the encoder's output."""
        return self.feat_out if self.feat_out > 0 else self.d_model

    @property
    def subsampling_channels(self) -> int:
        """Channels of the sub-sampling's convolutions."""
        return self.subsampling_conv_channels if self.subsampling_conv_channels > 0 else self.d_model

    @property
    def hashes_dropout(self) -> bool:
        return self.compile if self.dropout_draws is None else self.dropout_draws == "hash"

    @property
    def conv_norm_groups(self) -> int:
        """Number of groups of group_normN; 0 for every other norm."""
        groups = self.conv_norm_type.removeprefix("group_norm")
        return int(groups) if groups.isdecimal() and groups != self.conv_norm_type else 0

    @property
    def conv_padding(self) -> tuple[int, ...]:
        """Frames that the depthwise convolution sees on the left and on the right; () for an invalid value."""
        if self.conv_context_size is None:
            return ((self.conv_kernel_size - 1) // 2,) * 2
        if isinstance(self.conv_context_size, str):
            return (self.conv_kernel_size - 1, 0) if self.conv_context_size == "causal" else ()
        return self.conv_context_size


@dataclass(frozen=True)
class DecoderConfig:
    """The `model.decoder` block."""

    feat_in: int
    num_classes: int
    num_decoders: int
    squeeze_single: bool
    use_bias: bool

    def __post_init__(self) -> None:
        within(self, 1, 1 << 16, "feat_in")
        within(self, 2, 1 << 24, "num_classes")
        within(self, 1, 1 << 12, "num_decoders")


@dataclass(frozen=True)
class LossConfig:
    """The `model.loss` block. `combine_time_steps` is the number of mask positions in a token."""

    combine_time_steps: int
    mask_threshold: float
    num_decoders: int
    squeeze_single: bool
    nemo_exact: bool = False

    def __post_init__(self) -> None:
        within(self, 1, 64, "combine_time_steps")
        within(self, 0, 1, "mask_threshold", below=True)
        within(self, 1, 1 << 12, "num_decoders")


@dataclass(frozen=True)
class NestConfig:
    """The blocks of `model` that shape the network, checked against each other."""

    preprocessor: PreprocessorConfig
    masking: MaskingConfig
    quantizer: QuantizerConfig
    encoder: EncoderConfig
    decoder: DecoderConfig
    loss: LossConfig
    mask_after_subsampling: bool

    @classmethod
    def from_config(cls, config: DictConfig) -> NestConfig:
        """Read the configuration. Raises ConfigError naming the key that does not fit."""
        position = config.model.mask_position
        if position not in ("pre_conv", "post_conv"):
            raise ConfigError(f"model.mask_position: {short(position)} is not supported, use pre_conv or post_conv.")
        blocks = cls(
            preprocessor=section(PreprocessorConfig, config, "model.preprocessor"),
            encoder=section(EncoderConfig, config, "model.encoder"),
            masking=section(MaskingConfig, config, "model.masking"),
            quantizer=section(QuantizerConfig, config, "model.quantizer"),
            decoder=section(DecoderConfig, config, "model.decoder"),
            loss=section(LossConfig, config, "model.loss"),
            mask_after_subsampling=position == "post_conv",
        )
        if blocks.mask_after_subsampling:
            blocks._check_before_moving()
            blocks = blocks._moved_after_subsampling()
        blocks._check()
        blocks._check_against(config)
        return blocks

    def _check_against(self, config: DictConfig) -> None:
        """Compare the blocks with the keys of `model` that repeat them, which a checkpoint may lack."""
        keys = ("num_classes", "num_books", "code_dim", "squeeze_single")
        for name in ("preprocessor.sample_rate", *(f"quantizer.{key}" for key in keys)):
            key = name.partition(".")[2]
            stated, used = config.model.get(key), attrgetter(name)(self)
            if stated is not None and (isinstance(stated, bool) != isinstance(used, bool) or stated != used):
                raise ConfigError(f"model.{key} is {short(stated)}, but model.{name} is {used}. Make them equal.")

    def _check_before_moving(self) -> None:
        """Accept, with post_conv, the values that are right for pre_conv too, and no others."""
        factor, features = self.encoder.subsampling_factor, self.preprocessor.features
        if self.quantizer.init != "random":
            raise ConfigError(
                f"model.quantizer.init: {self.quantizer.init} needs model.mask_position=pre_conv. With post_conv the "
                "targets come from frames that change during training."
            )
        self._expect(self.encoder.d_model, "quantizer.feat_in", "masking.feat_in", either=features)
        self._expect(1, "quantizer.combine_time_steps", "loss.combine_time_steps", either=factor)

    def _moved_after_subsampling(self) -> NestConfig:
        """Count sub-sampled frames instead of feature frames in everything about masks and tokens (post_conv)."""
        factor, width = self.encoder.subsampling_factor, self.encoder.d_model
        return replace(
            self,
            masking=replace(self.masking, feat_in=width, block_size=max(1, self.masking.block_size // factor)),
            quantizer=replace(self.quantizer, feat_in=width, combine_time_steps=1),
            loss=replace(self.loss, combine_time_steps=1),
        )

    def _check(self) -> None:
        encoder, factor = self.encoder, self.encoder.subsampling_factor
        step, masked_width = (1, encoder.d_model) if self.mask_after_subsampling else (factor, encoder.feat_in)
        self._expect(self.preprocessor.features, "encoder.feat_in")
        self._expect(masked_width, "quantizer.feat_in", "masking.feat_in")
        self._expect(encoder.width_out, "decoder.feat_in")
        self._expect(self.quantizer.num_classes, "decoder.num_classes")
        self._expect(self.quantizer.num_books, "decoder.num_decoders", "loss.num_decoders")
        self._expect(self.quantizer.squeeze_single, "decoder.squeeze_single", "loss.squeeze_single")
        self._expect(step, "quantizer.combine_time_steps", "loss.combine_time_steps")
        if self.preprocessor.pad_to < 1 or self.preprocessor.pad_to % factor:
            raise ConfigError(
                f"model.preprocessor.pad_to: {self.preprocessor.pad_to} must be a multiple of "
                f"model.encoder.subsampling_factor={factor}, so that no token is cut off."
            )

    def _expect(self, wanted: object, *names: str, either: object = None) -> None:
        for name in names:
            if (value := attrgetter(name)(self)) not in (wanted, either):
                raise ConfigError(f"model.{name} is {value}, but the other blocks make it {wanted}.")


@dataclass(frozen=True)
class OptimizerConfig:
    """The `model.optim` block; `lr` is Noam annealing's factor."""

    name: str
    lr: float
    betas: tuple[float, ...]
    weight_decay: float

    def __post_init__(self) -> None:
        if self.name.lower() != "adamw":
            one_of(self, "name", "adamw")
        if len(self.betas) != 2:
            raise ValueError(f"betas: {list(self.betas)} must be two numbers.")
        within(self, 0, 1e6, "lr", above=True)
        within(self, 0, 1, "betas", below=True)
        within(self, 0, 1e3, "weight_decay")


@dataclass(frozen=True)
class ScheduleConfig:
    """The `model.optim.sched` block."""

    name: str
    d_model: int
    min_lr: float
    warmup_steps: int | None = None
    warmup_ratio: float | None = None

    def __post_init__(self) -> None:
        one_of(self, "name", "NoamAnnealing")
        within(self, 1, 1 << 16, "d_model")
        within(self, 0, 1e3, "min_lr")
        within(self, 0, 10**12, "warmup_steps")
        within(self, 0, 1, "warmup_ratio")

    def warmup(self, max_steps: int) -> int:
        """Number of warm-up steps: `warmup_steps`, or the share `warmup_ratio` of all steps; 0 without either."""
        if self.warmup_ratio is not None:
            if max_steps < 1:
                raise ConfigError("model.optim.sched.warmup_ratio needs trainer.max_steps. Set warmup_steps instead.")
            return int(self.warmup_ratio * max_steps)
        return self.warmup_steps or 0
