"""Record what a live NeMo 3.0.0 computes, for the tests of this directory to compare with.

    python tests/golden/record_nemo.py OUTDIR [FILE ...]

Run it with the python of an environment that holds `nemo_toolkit[asr]==3.0.0`; nestcli is not needed and
not imported. Each FILE is one of the names in RECORDINGS; without any, all are written. Everything is seeded
and runs on the CPU in fp32 with one thread, so that two recordings agree.

`config.json` of this directory is not made here: it is NeMo's nest_fast-conformer.yaml, which is not in the
package, read once with OmegaConf.
"""

import argparse
import copy
import json
import random
import re
import tempfile
from pathlib import Path

import nemo
import numpy as np
import soundfile as sf
import torch
from nemo.collections.asr.data.ssl_dataset import AudioNoiseBatch, sample_noise
from nemo.collections.asr.models import EncDecDenoiseMaskedTokenPredModel
from nemo.collections.asr.modules import (
    AudioToMelSpectrogramPreprocessor,
    RandomBlockMasking,
    RandomProjectionVectorQuantizer,
)
from nemo.collections.asr.modules.ssl_modules import MultiSpeakerNoiseAugmentation, SpeakerNoiseAugmentation
from nemo.core.optim.lr_scheduler import NoamAnnealing
from omegaconf import OmegaConf
from safetensors.torch import save

NEMO_MODULES = "nemo.collections.asr.modules."

# The model section of NeMo's nest_fast-conformer.yaml at 3.0.0 (Large), without data and optimiser.
LARGE = {
    "sample_rate": 16000,
    "num_classes": 8192,
    "num_books": 1,
    "code_dim": 16,
    "squeeze_single": False,
    "mask_position": "pre_conv",
    "preprocessor": {
        "_target_": NEMO_MODULES + "AudioToMelSpectrogramPreprocessor",
        "sample_rate": "${sample_rate}",
        "normalize": "per_feature",
        "window_size": 0.025,
        "window_stride": 0.01,
        "window": "hann",
        "features": 80,
        "n_fft": 512,
        "log": True,
        "frame_splicing": 1,
        "dither": 1e-5,
        "pad_to": 16,
        "pad_value": 0.0,
    },
    "spec_augment": {
        "_target_": NEMO_MODULES + "SpectrogramAugmentation",
        "freq_masks": 0,
        "time_masks": 0,
        "freq_width": 27,
        "time_width": 0.05,
    },
    "masking": {
        "_target_": NEMO_MODULES + "RandomBlockMasking",
        "block_size": 40,
        "mask_prob": 0.01,
        "feat_in": "${preprocessor.features}",
        "freeze": True,
        "allow_overlap": True,
    },
    "quantizer": {
        "_target_": NEMO_MODULES + "RandomProjectionVectorQuantizer",
        "feat_in": "${preprocessor.features}",
        "code_dim": "${code_dim}",
        "num_books": "${num_books}",
        "num_classes": "${num_classes}",
        "dist_fn": "l2",
        "freeze": True,
        "squeeze_single": "${squeeze_single}",
        "combine_time_steps": "${encoder.subsampling_factor}",
    },
    "encoder": {
        "_target_": NEMO_MODULES + "ConformerEncoder",
        "feat_in": "${preprocessor.features}",
        "feat_out": -1,
        "n_layers": 17,
        "d_model": 512,
        "use_bias": True,
        "subsampling": "dw_striding",
        "subsampling_factor": 8,
        "subsampling_conv_channels": 256,
        "causal_downsampling": False,
        "ff_expansion_factor": 4,
        "self_attention_model": "rel_pos",
        "n_heads": 8,
        "att_context_size": [-1, -1],
        "att_context_style": "regular",
        "xscaling": True,
        "untie_biases": True,
        "pos_emb_max_len": 5000,
        "conv_kernel_size": 9,
        "conv_norm_type": "batch_norm",
        "conv_context_size": None,
        "dropout": 0.1,
        "dropout_pre_encoder": 0.1,
        "dropout_emb": 0.0,
        "dropout_att": 0.1,
        "stochastic_depth_drop_prob": 0.0,
        "stochastic_depth_mode": "linear",
        "stochastic_depth_start_layer": 1,
    },
    "decoder": {
        "_target_": NEMO_MODULES + "MultiSoftmaxDecoder",
        "feat_in": "${encoder.d_model}",
        "num_classes": "${num_classes}",
        "num_decoders": "${num_books}",
        "squeeze_single": "${squeeze_single}",
        "use_bias": True,
    },
    "loss": {
        "_target_": "nemo.collections.asr.losses.MultiMLMLoss",
        "combine_time_steps": "${encoder.subsampling_factor}",
        "mask_threshold": 0.8,
        "num_decoders": "${num_books}",
        "squeeze_single": "${squeeze_single}",
    },
}

# The table at the head of that yaml.
PRESETS = {
    "small": {"d_model": 176, "n_heads": 4, "n_layers": 16},
    "medium": {"d_model": 256, "n_heads": 4, "n_layers": 16},
    "large": {"d_model": 512, "n_heads": 8, "n_layers": 17},
    "xlarge": {"d_model": 1024, "n_heads": 8, "n_layers": 24, "xscaling": False, "use_bias": False},
    "xxlarge": {
        "d_model": 1024,
        "n_heads": 8,
        "n_layers": 42,
        "xscaling": False,
        "use_bias": False,
        "conv_kernel_size": 5,
    },
}

TINY = {
    "num_classes": 64,
    "code_dim": 4,
    "masking": {"block_size": 10, "mask_prob": 0.1},
    "encoder": {"d_model": 16, "n_heads": 2, "n_layers": 2, "subsampling_conv_channels": 8},
}
NOBIAS = {
    "num_classes": 64,
    "code_dim": 4,
    "num_books": 2,
    "masking": {"block_size": 20, "mask_prob": 0.4, "allow_overlap": False},
    "encoder": {
        "d_model": 16,
        "n_heads": 4,
        "n_layers": 2,
        "subsampling_conv_channels": 8,
        "use_bias": False,
        "xscaling": False,
        "att_context_size": [4, 4],
        "conv_kernel_size": 5,
    },
}

# Waveforms are 8-bit: int8 in the file, divided by this when used. It keeps the file small and is exact.
WAVEFORM_STEPS = 1024.0
SAMPLES = [22950, 18800, 14720]  # 143, 117 and 92 frames: one padded, one odd, one a multiple of 4


# --- building -------------------------------------------------------------------------------------


def model_config(changes):
    """The resolved configuration of Large with `changes`."""
    config = OmegaConf.create(copy.deepcopy(LARGE))
    OmegaConf.set_struct(config, True)
    config = OmegaConf.merge(config, changes)
    return OmegaConf.create(OmegaConf.to_container(config, resolve=True))


def build(changes, seed=0):
    """A model as NeMo initialises it from `seed`, and its configuration."""
    config = model_config(changes)
    torch.manual_seed(seed)
    return EncDecDenoiseMaskedTokenPredModel(cfg=copy.deepcopy(config)), config


@torch.no_grad()
def unsettle(model, seed=1):
    """Move every value that starts at 0 or 1, so that leaving one out shows in the outputs."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.state_dict().items():
        if not value.is_floating_point():
            value.fill_(5)  # num_batches_tracked
            continue
        noise = torch.randn(value.shape, generator=generator)
        if name.endswith(("pos_bias_u", "pos_bias_v", "running_mean")):
            value.copy_(0.3 * noise)
        elif name.endswith("running_var"):
            value.copy_(0.5 + noise.abs())
        elif re.search(r"\.(norm\w*|batch_norm)\.(weight|bias)$", name):
            value.add_(0.2 * noise)


def waveforms(seed):
    """Chirps, different for each utterance, with noise; (B, N) int8, zero beyond each length."""
    generator = torch.Generator().manual_seed(seed)
    seconds = torch.arange(max(SAMPLES)) / 16000
    rows = []
    for index, samples in enumerate(SAMPLES):
        start_hz, rise_hz = 150.0 * (index + 1), 900.0 * (index + 1)
        phase = 2 * torch.pi * (start_hz + rise_hz * seconds / 2) * seconds
        loudness = 0.6 + 0.4 * torch.sin(2 * torch.pi * 3 * seconds)
        row = 0.05 * loudness * (torch.sin(phase) + 0.5 * torch.sin(3.1 * phase))
        row += 0.01 * torch.randn(row.shape, generator=generator)
        row[samples:] = 0
        rows.append(row)
    steps = (torch.stack(rows) * WAVEFORM_STEPS).round()
    assert steps.abs().max() < 128
    return steps.to(torch.int8), torch.tensor(SAMPLES)


def noisy_waveforms(clean, seed):
    """`clean` with white noise over the middle of each utterance; int8 too."""
    generator = torch.Generator().manual_seed(seed)
    noisy = clean.float()
    for row, samples in zip(noisy, SAMPLES, strict=True):
        middle = slice(samples // 4, 3 * samples // 4)
        row[middle] += 15 * torch.randn(row[middle].shape, generator=generator)
    return noisy.round().clamp(-127, 127).to(torch.int8)


# --- files ----------------------------------------------------------------------------------------


def versions():
    return {"nemo": nemo.__version__, "torch": torch.__version__}


def write_tensors(path, tensors, **facts):
    """Write `tensors`; each of `facts` becomes JSON in the header, beside the versions."""
    notes = versions() | {name: json.dumps(fact) for name, fact in facts.items()}
    file = save({name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}, notes)
    # safetensors writes the notes in an order of chance; sorted, two recordings are equal byte by byte.
    start = 8 + int.from_bytes(file[:8], "little")
    header = json.loads(file[8:start])
    header["__metadata__"] = dict(sorted(notes.items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + file[start:])


def write_json(path, facts):
    path.write_text(json.dumps(versions() | facts, indent=1) + "\n")


# --- recordings -----------------------------------------------------------------------------------


def whole_forward(model, inputs, seed):
    """One batch through NeMo's own forward and loss. The inputs are cloned: dither changes them in place."""
    torch.manual_seed(seed)
    log_probs, encoded_len, masks, tokens = model(
        input_signal=inputs["clean"].clone(),
        input_signal_length=inputs["clean_len"],
        noisy_input_signal=inputs["noisy"].clone(),
        noisy_input_signal_length=inputs["noisy_len"],
        apply_mask=True,
    )
    draw_after = torch.rand(1)
    loss = model.loss(masks=masks, decoder_outputs=log_probs, targets=tokens, decoder_lengths=encoded_len)

    windows = masks.transpose(1, 2).reshape(len(masks), -1, 8 * masks.shape[1]).mean(-1)
    selected = (windows > 0.8).sum()
    assert selected > 10, f"only {selected} tokens selected"
    return loss, {
        "mask": one_mask_a_frame(masks),
        "tokens": tokens,
        "selected": selected,
        "draw_after": draw_after,
    }


def one_mask_a_frame(masks_BDT):
    assert torch.equal(masks_BDT, masks_BDT[:, :1].expand_as(masks_BDT))
    return masks_BDT[:, 0].to(torch.uint8)


@torch.no_grad()
def stages(model, inputs):
    """Every stage in eval mode, each fed with the one before it."""
    found = {}
    clean, clean_frames = model.preprocessor(input_signal=inputs["clean"].clone(), length=inputs["clean_len"])
    noisy, noisy_frames = model.preprocessor(input_signal=inputs["noisy"].clone(), length=inputs["noisy_len"])
    assert torch.equal(clean_frames, noisy_frames)
    found |= {"features.eval.clean": clean, "features.eval.noisy": noisy, "features.eval.len": clean_frames}
    found["tokens"] = model.quantizer(input_signal=clean)[1]

    torch.manual_seed(11)
    masked, masks = model.mask_processor(input_feats=noisy, input_lengths=noisy_frames)
    found["mask"] = one_mask_a_frame(masks)
    embedding = model.mask_processor.mask_embedding[:, None]
    assert torch.equal(masked, torch.where(found["mask"][:, None].bool(), embedding, noisy))

    def keep(name):
        def hook(_module, _inputs, output):
            found[name], *lengths = output if isinstance(output, tuple) else (output,)
            found.update({f"{name}_len": length for length in lengths})

        return hook

    hooks = [model.encoder.pre_encode.register_forward_hook(keep("encoder.eval.pre_encode"))]
    for index, layer in enumerate(model.encoder.layers):
        hooks.append(layer.register_forward_hook(keep(f"encoder.eval.layer.{index}")))
    encoded, encoded_len = model.encoder(audio_signal=masked, length=noisy_frames)
    for hook in hooks:
        hook.remove()
    found["encoder.eval.out"], found["encoder.eval.len"] = encoded, encoded_len
    found["log_probs"] = model.decoder(encoder_output=encoded)
    return found


def record_model(path, changes, gradients):
    model, config = build(changes)
    unsettle(model)
    record = {f"state.{name}": value.clone() for name, value in model.state_dict().items()}

    clean, samples = waveforms(seed=2)
    noisy = noisy_waveforms(clean, seed=3)
    inputs = {
        "clean": clean / WAVEFORM_STEPS,
        "clean_len": samples,
        "noisy": noisy / WAVEFORM_STEPS,
        "noisy_len": samples.clone(),
    }

    model.eval()
    record |= stages(model, inputs)
    with torch.no_grad():
        record["loss.eval"], facts = whole_forward(model, inputs, seed=13)
    record |= {f"forward.eval.{name}": value for name, value in facts.items()}

    model.train()
    torch.manual_seed(7)
    dithered, _ = model.preprocessor(input_signal=inputs["clean"].clone(), length=samples)
    record["loss.train"], facts = whole_forward(model, inputs, seed=17)
    record |= {f"forward.train.{name}": value for name, value in facts.items()}

    # What model_tiny holds, bit for bit, is not repeated.
    absent = [f"features.eval.{name}" for name in ("clean", "noisy", "len")]
    absent += ["state.preprocessor.featurizer.fb"]
    if gradients:
        record |= {"in.clean": clean, "in.clean_len": samples, "in.noisy": noisy, "in.noisy_len": samples}
        record["features.train.clean"] = dithered[:, ::8]
        record["loss.train"].backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name
            if parameter.requires_grad:
                record[f"grad.{name}"] = parameter.grad
        for name, value in model.state_dict().items():
            if re.search(r"running_(mean|var)$|num_batches_tracked$", name):
                record[f"after.{name}"] = value
    else:
        for name in absent:
            del record[name]

    notes = {
        "in.*": f"int8; waveform = value.float() / {WAVEFORM_STEPS:g}; in model_tiny, for both models",
        "features.train.clean": "mel bins 0, 8, 16, ... only",
        "mask, encoder.eval.*, log_probs": "from features.eval.noisy, with mask_embedding where mask is 1",
        "forward.*": "what the whole forward behind loss.* saw; draw_after: torch.rand(1) right after it",
        "state.*": "as initialised from seed 0, but for norms, statistics, pos_bias_u and pos_bias_v",
        "left out, being as in model_tiny": [] if gradients else absent,
    }
    write_tensors(path, record, config=OmegaConf.to_container(config), notes=notes)


def record_model_tiny(path):
    record_model(path, TINY, gradients=True)


def record_model_nobias(path):
    record_model(path, NOBIAS, gradients=False)


def record_masking(path):
    overlap = [
        # mask_prob, block_size, frames T, lengths
        (0.01, 40, 240, [233, 200, 120]),
        (0.01, 40, 48, [39, 40, 41, 48]),
        (0.03, 10, 96, [96, 50, 9, 10]),
        (0.6, 8, 64, [64, 33, 8, 7]),
        (0.2, 1, 32, [32, 5, 1, 0]),
        (1.0, 5, 32, [32, 17, 5, 4]),
        (0.0, 5, 32, [32, 17]),
    ]
    disjoint = [
        (0.3, 40, 240, [233, 200, 120]),
        (0.3, 40, 400, [400]),  # these two differ only in T: NeMo rounds the number of blocks in two ways
        (0.3, 40, 416, [400]),
        (0.6, 40, 240, [240, 100, 79, 80]),
        (0.6, 10, 96, [96, 51, 20, 19]),
        (0.3, 40, 48, [39, 40, 41, 48]),
        (0.5, 48, 48, [10, 2, 1, 0]),
        (0.2, 1, 32, [32, 5, 1, 0]),
        (0.0, 5, 32, [32, 17]),
        (1.0, 8, 64, [64, 33, 8, 7]),
    ]
    masks, cases = {}, []
    for allow_overlap, settings in ((True, overlap), (False, disjoint)):
        for mask_prob, block_size, frames, lengths in settings:
            for seed in (0, 1):
                masking = RandomBlockMasking(
                    feat_in=2, mask_prob=mask_prob, block_size=block_size, allow_overlap=allow_overlap
                )
                torch.manual_seed(seed)
                _, mask = masking(input_feats=torch.zeros(len(lengths), 2, frames), input_lengths=torch.tensor(lengths))
                masks[f"{len(cases):02d}"] = one_mask_a_frame(mask)
                cases.append(
                    {
                        "allow_overlap": allow_overlap,
                        "mask_prob": mask_prob,
                        "block_size": block_size,
                        "frames": frames,
                        "lengths": lengths,
                        "seed": seed,
                        "next_draw": torch.rand(1).item(),
                    }
                )
    write_tensors(path, masks, cases=cases)


def record_quantizer(path):
    config = {"feat_in": 10, "code_dim": 4, "num_classes": 50, "dist_fn": "l2", "combine_time_steps": 8}
    record = {}
    for books in (1, 4):
        torch.manual_seed(books)
        quantizer = RandomProjectionVectorQuantizer(num_books=books, **config)
        features = torch.randn(2, config["feat_in"], 64)
        record[f"books{books}.feats"] = features
        record[f"books{books}.proj"] = quantizer.proj.weight
        record[f"books{books}.codebooks"] = quantizer.codebooks
        record[f"books{books}.tokens"] = quantizer(input_signal=features)[1]
    write_tensors(path, record, config=config, notes="manual_seed(books), the quantizer, feats = randn")


def augmentation_cases():
    """(class, arguments, batch size, samples) for every recording; the seed is the position."""
    rates = {"min_mix_rate": 0.5, "max_mix_rate": 0.5}, {"min_mix_rate": 0.3, "max_mix_rate": 0.8}
    one = {"min_num_segments": 1, "max_num_segments": 1, "min_num_speakers": 1, "max_num_speakers": 1}
    many = {"min_num_segments": 1, "max_num_segments": 4, "min_num_speakers": 1, "max_num_speakers": 3}
    for rate in rates:
        for noise_ratio in (0.0, 0.5, 1.0):
            for batch_size, prob in ((2, 1.0), (4, 0.5)):
                common = {"prob": prob, "noise_ratio": noise_ratio, **rate}
                yield SpeakerNoiseAugmentation, common, batch_size, 48
                yield MultiSpeakerNoiseAugmentation, common | one, batch_size, 48
                yield MultiSpeakerNoiseAugmentation, common | many, batch_size, 72

    half = {"noise_ratio": 0.5, **rates[0]}
    for cls, extra in ((SpeakerNoiseAugmentation, {}), (MultiSpeakerNoiseAugmentation, one)):
        yield cls, {"prob": 0.0, **half, **extra}, 3, 60
        yield cls, {"prob": 1.0, "noise_ratio": 0.0, **rates[0], **extra}, 1, 60  # nobody else: noise
    # Louder, longer, all of the clip, and none of it.
    loud = {"min_r_speech": 0.0, "max_r_speech": 0.0, "min_r_noise": -30.0, "max_r_noise": -20.0}
    yield MultiSpeakerNoiseAugmentation, {"prob": 1.0, **half, **many, **loud}, 2, 220
    yield SpeakerNoiseAugmentation, {"prob": 1.0, **half, **loud}, 2, 220
    whole = {"min_mix_rate": 1.0, "max_mix_rate": 1.0}
    for noise_ratio in (0.0, 1.0):
        yield MultiSpeakerNoiseAugmentation, {"prob": 1.0, "noise_ratio": noise_ratio, **whole, **many}, 3, 64
    yield MultiSpeakerNoiseAugmentation, {"prob": 1.0, "noise_ratio": 0.5, **one, "max_mix_rate": 0.0}, 2, 60


def random_batch(seed, batch_size, samples):
    """Unequal speech and noise; that of odd items is shorter than the speech, some items have none."""
    generator = torch.Generator().manual_seed(seed)
    audio_len = torch.tensor([samples] + [samples - 7 * i - seed % 5 for i in range(1, batch_size)])
    noise_len = audio_len.clone()
    noise_len[1::2] //= 3
    if seed % 3 == 0:
        noise_len[0] = samples // 4
    audio = 0.1 * torch.randn(batch_size, samples, generator=generator)
    noise = 0.05 * torch.randn(batch_size, samples, generator=generator)
    if seed % 4 == 1 and batch_size > 2:
        noise[2] = 0
    beyond = torch.arange(samples)
    audio[beyond >= audio_len[:, None]] = 0
    noise[beyond >= noise_len[:, None]] = 0
    return {"audio": audio, "audio_len": audio_len, "noise": noise, "noise_len": noise_len}


def record_augmentation(path):
    record, cases = {}, []
    for seed, (cls, arguments, batch_size, samples) in enumerate(augmentation_cases()):
        given = random_batch(seed, batch_size, samples)
        record |= {f"{seed:02d}.in.{name}": value.clone() for name, value in given.items()}
        random.seed(seed)
        mixed = cls(**arguments)(AudioNoiseBatch(**given))
        cases.append({"class": cls.__name__, "seed": seed, "arguments": arguments, "next_draw": random.random()})
        for name in ("noise", "noise_len", "noisy_audio", "noisy_audio_len"):
            record[f"{seed:02d}.out.{name}"] = getattr(mixed, name).clone()
    write_tensors(path, record, cases=cases)


def noam_rates(steps, lr, **settings):
    """The learning rate that NeMo's scheduler sets for each of `steps` (ascending)."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    schedule = NoamAnnealing(optimizer, **settings)
    rates = []
    for step in range(max(steps) + 1):
        if step in steps:
            rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def record_schedule(path):
    nest = {"lr": 5.0, "d_model": 512, "warmup_steps": 25000, "min_lr": 1e-6}
    requests = [
        ([0, 1, 2, 10, 24999, 25000, 25001, 100000], nest),
        (list(range(60)), {"lr": 5.0, "d_model": 176, "warmup_steps": 20, "min_lr": 0.0}),
        (list(range(220)), {"lr": 5.0, "d_model": 176, "warmup_ratio": 0.1, "max_steps": 200, "min_lr": 0.0}),
        (list(range(60)), {"lr": 5.0, "d_model": 176, "warmup_steps": 20, "min_lr": 0.07}),
        (list(range(20)), {"lr": 5.0, "d_model": 176, "min_lr": 0.0}),
    ]
    noam = [{"settings": settings, "steps": steps, "lr": noam_rates(steps, **settings)} for steps, settings in requests]
    write_json(path, {"noam": noam})


def described(state):
    return [[name, list(value.shape), str(value.dtype).split(".")[1]] for name, value in state.items()]


def one_layer_of(state):
    """The entries of `state` with only layer 0 of the encoder, after checking that all layers are alike."""
    layers = {}
    for name, shape, dtype in described(state):
        if match := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", name):
            layers.setdefault(int(match[1]), []).append((match[2], shape, dtype))
    assert sorted(layers) == list(range(len(layers)))
    assert all(layer == layers[0] for layer in layers.values())
    kept = [entry for entry in described(state) if not re.match(r"encoder\.layers\.(?!0\.)", entry[0])]
    return {"layers": len(layers), "layers_are_alike": True, "entries": kept}


def parameter_counts(model):
    parameters = list(model.parameters())
    return {
        "total": sum(p.numel() for p in parameters),
        "trainable": sum(p.numel() for p in parameters if p.requires_grad),
        "frozen": sum(p.numel() for p in parameters if not p.requires_grad),
        "modules": {name: sum(p.numel() for p in module.parameters()) for name, module in model.named_children()},
    }


def record_structure(path):
    """Counts of the presets, and names, shapes and types of what is saved. XXLarge takes 9 GB here."""
    presets, state_dict = {}, {}
    for name, sizes in PRESETS.items():
        model, _ = build({"encoder": sizes})
        presets[name] = {"encoder": sizes} | parameter_counts(model)
        if name == "small":
            state_dict["small"] = one_layer_of(model.state_dict())
        del model
    for name, changes in (("model_tiny", TINY), ("model_nobias", NOBIAS)):
        state_dict[name] = {"entries": described(build(changes)[0].state_dict())}
    write_json(path, {"method": "every preset built whole", "presets": presets, "state_dict": state_dict})


def record_padding(path):
    """Features whose padding is not 0: frames behind the length, and frames up to a multiple of pad_to."""
    settings = LARGE["preprocessor"] | {"sample_rate": 16000, "features": 8}
    del settings["_target_"]
    generator = torch.Generator().manual_seed(7)
    audio, lengths = torch.randn(2, 4100, generator=generator).half() / 8, torch.tensor([4100, 1700])
    record, cases = {"audio": audio, "lengths": lengths}, {}
    for number, (normalize, pad_value, pad_to) in enumerate(
        [("per_feature", 2.5, 16), ("per_feature", -1.0, 32), ("all_features", 0.5, 8), ("per_feature", 0.0, 16)]
    ):
        changes = {"normalize": normalize, "pad_value": pad_value, "pad_to": pad_to}
        preprocessor = AudioToMelSpectrogramPreprocessor(**(settings | changes))
        cases[f"{number}"] = changes
        for mode in ("train", "eval"):
            preprocessor.train(mode == "train")
            torch.manual_seed(5)
            features, frames = preprocessor(input_signal=audio.float().clone(), length=lengths)
            record |= {f"{number}.{mode}": features, f"{number}.{mode}_frames": frames}
    write_tensors(path, record, cases=cases, notes="manual_seed(5) before each; the config's other values, 8 mel bins")


def record_init(path):
    model, config = build(TINY)
    record = {"next_draw": torch.rand(1)}
    for name, value in model.state_dict().items():
        record[f"sum.{name}"] = value.double().sum()
        record[f"head.{name}"] = value.flatten()[:4]
    write_tensors(path, record, config=OmegaConf.to_container(config), notes="manual_seed(0), then the model")


def write_sounds(folder):
    """Noise of several kinds, from whole numbers alone; the lines of its manifest, the last one's file is not there."""
    lines = []
    for number, (seconds, level, shift) in enumerate(
        ((0.5, 3000, 0), (2, 900, 40), (5, 200, 0), (3, 0, 0), (3, 90, -700))
    ):
        places = np.arange(int(seconds * 16000), dtype=np.int64)
        samples = (places * (places + 7 * number + 3) % 2039 - 1019) * level // 1019 + shift
        sf.write(folder / f"{number}.wav", samples.astype(np.int16), 16000, subtype="PCM_16")
        lines.append({"audio_filepath": str(folder / f"{number}.wav"), "duration": float(seconds)})
    lines[2] |= {"offset": 1.5, "duration": 3.5}
    lines[0] |= {"offset": 0.1, "duration": 0.3}
    return [*lines, {"audio_filepath": str(folder / "gone.wav"), "duration": 4.0}]


def record_noise(path):
    """Clips from `sample_noise`: their lengths, sums and ends, and NumPy's next draw."""
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        lines = write_sounds(Path(folder))
        for seed in range(6):
            np.random.seed(seed)
            samples, clips = (16000, 8000, 25000)[seed % 3], []
            for _ in range(8):
                clip, length = sample_noise(lines, 16000, samples)
                kept = clip[: int(length)].double()
                ends = [float(kept[0]), float(kept[-1])]
                clips.append([int(length), float(kept.sum()), float((kept**2).sum()), *ends])
            cases.append({"seed": seed, "samples": samples, "clips": clips, "next_draw": np.random.random_sample()})
    write_json(path, {"method": "write_sounds of tests/golden/record_nemo.py, then sample_noise", "cases": cases})


RECORDINGS = {
    "model_tiny.safetensors": record_model_tiny,
    "model_nobias.safetensors": record_model_nobias,
    "masking.safetensors": record_masking,
    "quantizer.safetensors": record_quantizer,
    "augmentation.safetensors": record_augmentation,
    "noise_and_schedule.json": record_schedule,
    "noise_draws.json": record_noise,
    "structure.json": record_structure,
    "init.safetensors": record_init,
    "padding.safetensors": record_padding,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("outdir", type=Path)
    parser.add_argument("files", nargs="*", metavar="FILE", help="one of " + ", ".join(RECORDINGS))
    arguments = parser.parse_args()
    arguments.outdir.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for name in arguments.files or RECORDINGS:
        path = arguments.outdir / name
        RECORDINGS[name](path)
        print(f"{path.stat().st_size:>9,}  {name}")


if __name__ == "__main__":
    main()
