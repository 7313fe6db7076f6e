"""Every block of the model's YAML, checked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from operator import attrgetter

from omegaconf import DictConfig

from nestcli.bounds import within
from nestcli.config import section
from nestcli.errors import ConfigError
from nestcli.untrusted import short

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
        if self.normalize not in (PER_FEATURE, ALL_FEATURES):
            raise ValueError(f"normalize: {self.normalize!r} is not supported, use {PER_FEATURE} or {ALL_FEATURES}.")
        fixed = {"window": "hann", "log": True, "frame_splicing": 1}
        for key, only in fixed.items():
            if getattr(self, key) != only:
                raise ValueError(f"{key}: {getattr(self, key)!r} is not supported, only {only!r} is.")
        if not 2 <= self.window_length <= self.n_fft:
            raise ValueError(f"window_size: {self.window_length} samples do not fit into n_fft={self.n_fft}.")
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

    def __post_init__(self) -> None:
        within(self, 1, 1 << 16, "feat_in")
        within(self, 1, 1 << 14, "code_dim")
        within(self, 1, 1 << 12, "num_books")
        within(self, 2, 1 << 24, "num_classes")
        within(self, 1, 64, "combine_time_steps")
        if self.dist_fn not in ("l2", "cosine"):
            raise ValueError(f"dist_fn: {self.dist_fn!r} is not a distance. Use l2 or cosine.")


@dataclass(frozen=True)
class EncoderConfig:
    """The `model.encoder` block. Sizes come from the configuration alone."""

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
    pos_emb_max_len: int = 5000  # of NeMo's encoder alone; our table of positions grows as needed
    use_pytorch_sdpa: bool = False
    conv_norm_ignore_padding: bool = False
    backend: str = "nest"  # whose code trains; the model is the same, and everything but training uses ours
    compile: bool = False  # of the layers, by torch.compile
    dropout_draws: str | None = None  # torch: its generator's, as NeMo's; hash: cheap ones; None: hash if compiled

    def __post_init__(self) -> None:
        fixed = {
            "subsampling": "dw_striding",
            "causal_downsampling": False,
            "self_attention_model": "rel_pos",
        }
        for key, only in fixed.items():
            if getattr(self, key) != only:
                raise ValueError(f"{key}: {getattr(self, key)!r} is not supported, only {only!r} is.")
        self._check_numbers()
        if self.subsampling_factor < 2 or self.subsampling_factor & (self.subsampling_factor - 1):
            raise ValueError(f"subsampling_factor: {self.subsampling_factor} is not a power of 2 from 2 on.")
        if self.d_model % self.n_heads or self.d_model % 2:
            raise ValueError(f"d_model: {self.d_model} must be even and a multiple of n_heads={self.n_heads}.")
        if self.conv_kernel_size % 2 == 0:
            raise ValueError(f"conv_kernel_size: {self.conv_kernel_size} must be odd.")
        if self.att_context_style not in ("regular", "chunked_limited"):
            raise ValueError(f"att_context_style: {self.att_context_style!r}: use regular or chunked_limited.")
        if len(self.att_context_size) != 2:
            raise ValueError(f"att_context_size: {list(self.att_context_size)} must be [left, right].")
        self._check_chunks()
        if self.stochastic_depth_mode not in ("linear", "uniform"):
            raise ValueError(f"stochastic_depth_mode: {self.stochastic_depth_mode!r}: use linear or uniform.")
        if self.stochastic_depth_drop_prob and not 1 <= self.stochastic_depth_start_layer <= self.n_layers:
            raise ValueError(f"stochastic_depth_start_layer: {self.stochastic_depth_start_layer} is not a layer.")
        if self.backend not in ("nest", "nemo"):
            raise ValueError(f"backend: {self.backend!r} is not an encoder: use nest or nemo.")
        if self.dropout_draws not in (None, "torch", "hash"):
            raise ValueError(f"dropout_draws: {self.dropout_draws!r}: use torch or hash.")
        if self.backend == "nemo" and (self.compile or self.dropout_draws == "hash"):
            raise ValueError("backend: NeMo's encoder is trained as it is. Leave out compile and dropout_draws.")
        self._check_convolution()

    def _check_chunks(self) -> None:
        """As in NeMo: chunks of right + 1 frames, and whole ones to the left."""
        left, right = self.att_context_size
        chunked = self.att_context_style == "chunked_limited"
        if chunked and right < 0:
            raise ValueError(
                f"att_context_size: with chunked_limited the right context of {list(self.att_context_size)} must be "
                "at least 0: it sets the length of a chunk. Or set att_context_style to regular."
            )
        if chunked and left > 0 and left % (right + 1):
            raise ValueError(
                f"att_context_size: with chunked_limited the left context of {list(self.att_context_size)} must be a "
                f"multiple of a chunk's {right + 1} frames (the right context + 1), or -1."
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
            if getattr(self, key) != -1:  # which stands for d_model
                within(self, 1, largest, key)
        if not isinstance(self.conv_context_size, str):
            within(self, 0, 1 << 12, "conv_context_size")

    @property
    def hashes_dropout(self) -> bool:
        return self.compile if self.dropout_draws is None else self.dropout_draws == "hash"

    def _check_convolution(self) -> None:
        if self.conv_norm_type not in ("batch_norm", "layer_norm") and not self.conv_norm_groups:
            raise ValueError(f"conv_norm_type: {self.conv_norm_type!r}: use batch_norm, layer_norm or group_normN.")
        if self.conv_norm_groups and self.d_model % self.conv_norm_groups:
            raise ValueError(
                f"conv_norm_type: d_model={self.d_model} is no multiple of {self.conv_norm_groups} groups."
            )
        if self.conv_norm_ignore_padding and self.conv_norm_type != "batch_norm":
            raise ValueError("conv_norm_ignore_padding: only batch_norm can leave padding out.")
        if self.conv_norm_ignore_padding and self.backend == "nemo":
            raise ValueError("conv_norm_ignore_padding: NeMo's encoder cannot do that. Set model.encoder.backend=nest.")
        if len(self.conv_padding) != 2 or sum(self.conv_padding) + 1 != self.conv_kernel_size:
            raise ValueError(f"conv_context_size: {self.conv_context_size} must add up to conv_kernel_size - 1.")

    @property
    def conv_norm_groups(self) -> int:
        groups = self.conv_norm_type.removeprefix("group_norm")
        return int(groups) if groups.isdecimal() and groups != self.conv_norm_type else 0

    @property
    def conv_padding(self) -> tuple[int, ...]:
        """Frames that the depthwise convolution sees to the left and to the right."""
        if self.conv_context_size is None:
            return ((self.conv_kernel_size - 1) // 2,) * 2
        if isinstance(self.conv_context_size, str):
            return (self.conv_kernel_size - 1, 0) if self.conv_context_size == "causal" else ()
        return self.conv_context_size

    def drop_probability(self, layer: int) -> float:
        """Stochastic depth of a layer (arXiv:1603.09382): 0 before the start layer, then uniform or rising."""
        start = self.stochastic_depth_start_layer
        if layer < start:
            return 0.0
        if self.stochastic_depth_mode == "uniform":
            return self.stochastic_depth_drop_prob
        return (layer - start + 1) / (self.n_layers - start) * self.stochastic_depth_drop_prob


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
    """The blocks of `model` that shape the network, checked and made to fit each other."""

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
            raise ConfigError(f"model.mask_position: {position!r}: use pre_conv or post_conv.")
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
        """Compare the blocks with the keys of `model` that they repeat, and that a checkpoint need not have."""
        for key, name in (
            ("sample_rate", "preprocessor.sample_rate"),
            ("num_classes", "quantizer.num_classes"),
            ("num_books", "quantizer.num_books"),
            ("code_dim", "quantizer.code_dim"),
            ("squeeze_single", "quantizer.squeeze_single"),
        ):
            stated, used = config.model.get(key), attrgetter(name)(self)
            if stated is not None and (isinstance(stated, bool) != isinstance(used, bool) or stated != used):
                raise ConfigError(f"model.{key} is {short(stated)}, but model.{name} is {used}. Let them be the same.")

    def _check_before_moving(self) -> None:
        """With post_conv, values that are right for pre_conv are taken too, and no others."""
        factor, widths = self.encoder.subsampling_factor, (self.preprocessor.features, self.encoder.d_model)
        for name, either in (
            ("quantizer.feat_in", widths),
            ("masking.feat_in", widths),
            ("quantizer.combine_time_steps", (factor, 1)),
            ("loss.combine_time_steps", (factor, 1)),
        ):
            if (value := attrgetter(name)(self)) not in either:
                raise ConfigError(f"model.{name} is {value}, but the other blocks make it {either[1]}.")

    def _moved_after_subsampling(self) -> NestConfig:
        """With post_conv, everything about masks and tokens counts sub-sampled frames instead of feature frames."""
        factor, width = self.encoder.subsampling_factor, self.encoder.d_model
        return replace(
            self,
            masking=replace(self.masking, feat_in=width, block_size=max(1, self.masking.block_size // factor)),
            quantizer=replace(self.quantizer, feat_in=width, combine_time_steps=1),
            loss=replace(self.loss, combine_time_steps=1),
        )

    def _check(self) -> None:
        encoder_out = self.encoder.feat_out if self.encoder.feat_out > 0 else self.encoder.d_model
        step = 1 if self.mask_after_subsampling else self.encoder.subsampling_factor
        masked_width = self.encoder.d_model if self.mask_after_subsampling else self.preprocessor.features
        for key, value, wanted in (
            ("encoder.feat_in", self.encoder.feat_in, self.preprocessor.features),
            ("quantizer.feat_in", self.quantizer.feat_in, masked_width),
            ("masking.feat_in", self.masking.feat_in, masked_width),
            ("decoder.feat_in", self.decoder.feat_in, encoder_out),
            ("decoder.num_classes", self.decoder.num_classes, self.quantizer.num_classes),
            ("decoder.num_decoders", self.decoder.num_decoders, self.quantizer.num_books),
            ("decoder.squeeze_single", self.decoder.squeeze_single, self.quantizer.squeeze_single),
            ("loss.num_decoders", self.loss.num_decoders, self.quantizer.num_books),
            ("loss.squeeze_single", self.loss.squeeze_single, self.quantizer.squeeze_single),
            ("quantizer.combine_time_steps", self.quantizer.combine_time_steps, step),
            ("loss.combine_time_steps", self.loss.combine_time_steps, step),
        ):
            if value != wanted:
                raise ConfigError(f"model.{key} is {value}, but the other blocks make it {wanted}.")
        if self.preprocessor.pad_to < 1 or self.preprocessor.pad_to % self.encoder.subsampling_factor:
            raise ConfigError(
                f"model.preprocessor.pad_to: {self.preprocessor.pad_to} must be a multiple of "
                f"model.encoder.subsampling_factor={self.encoder.subsampling_factor}, so that tokens come out whole."
            )


@dataclass(frozen=True)
class OptimizerConfig:
    """The `model.optim` block; `lr` is Noam annealing's factor."""

    name: str
    lr: float
    betas: tuple[float, ...]
    weight_decay: float

    def __post_init__(self) -> None:
        if self.name.lower() != "adamw":
            raise ValueError(f"name: {self.name!r} is not supported, only adamw is.")
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
        if self.name != "NoamAnnealing":
            raise ValueError(f"name: {self.name!r} is not supported, only NoamAnnealing is.")
        within(self, 1, 1 << 16, "d_model")
        within(self, 0, 1e3, "min_lr")
        within(self, 0, 10**12, "warmup_steps")
        within(self, 0, 1, "warmup_ratio")

    def warmup(self, max_steps: int) -> int:
        """Steps of the warm-up: `warmup_steps`, or `warmup_ratio` of all steps; 0 without either."""
        if self.warmup_ratio is not None:
            if max_steps < 1:
                raise ConfigError("model.optim.sched.warmup_ratio needs trainer.max_steps. Set warmup_steps instead.")
            return int(self.warmup_ratio * max_steps)
        return self.warmup_steps or 0
