"""NeMo's side of a comparison: answer requests with results of NeMo 3.0.0.

This file is standalone: it imports nothing from nestcli, so that the Python of another environment can run it.

    NEMO_PYTHON worker.py FOLDER

reads one JSON request per line from standard input, {"operation": NAME, "parameters": {...}, "tensors": FILE}, and
answers each with one line {"facts": {...}, "tensors": FILE} or {"error": TEXT}. Tensors are exchanged as safetensors
files in FOLDER. NeMo's own output goes to standard error. The function `answer` does the same within a process.

Everything runs on the CPU in fp32. `model` in the parameters is the resolved `model` block of a configuration.
"""

import contextlib
import copy
import hashlib
import inspect
import json
import os
import random
import shutil
import sys
import tempfile
import traceback
from pathlib import Path

_STATE: dict[str, object] = {}  # the model of this comparison, once "build" has created it


def forget():
    """Release the kept model."""
    _STATE.clear()


def answer(operation, parameters, tensors):
    """Return the facts (plain data) and tensors that NeMo computes for one request."""
    import torch

    facts, found = OPERATIONS[operation](parameters, tensors)
    return facts, {name: value.detach().clone().contiguous() for name, value in found.items() if torch.is_tensor(value)}


# ---- models ------------------------------------------------------------------------------------------------------


def _model_class():
    from nemo.collections.asr.models import EncDecDenoiseMaskedTokenPredModel

    return EncDecDenoiseMaskedTokenPredModel


def _config(model):
    from omegaconf import OmegaConf

    return OmegaConf.create(copy.deepcopy(model))


def _built(model, on_meta=False):
    """Build NeMo's model; on the meta device it has names, shapes and types but takes no memory."""
    import torch
    from torch.overrides import TorchFunctionMode

    if not on_meta:
        return _model_class()(cfg=_config(model))

    class PlainNumbers(TorchFunctionMode):
        """Keeps a few small tensors on the CPU, as NeMo reads numbers from them while it builds the model."""

        def __torch_function__(self, function, types, args=(), kwargs=None):
            kwargs = dict(kwargs or {})
            if function in (torch.linspace, torch.arange, torch.tensor):
                kwargs["device"] = "cpu"
            return function(*args, **kwargs)

    with torch.device("meta"), PlainNumbers():
        return _model_class()(cfg=_config(model))


def _model(train):
    """Return the kept model, reset to its kept weights and statistics."""
    model = _STATE["model"]
    model.load_state_dict(_STATE["weights"])
    model.zero_grad(set_to_none=True)
    return model.train() if train else model.eval()


def _structure(parameters, _tensors):
    model = _built(parameters["model"], on_meta=True)
    entries = [[name, list(value.shape), str(value.dtype)[6:]] for name, value in model.state_dict().items()]
    sizes = [[name, value.numel(), value.requires_grad] for name, value in model.named_parameters()]
    return {"entries": entries, "parameters": sizes}, {}


def _build(parameters, _tensors):
    """Build and keep the model from a seed; return checksums of its initial weights."""
    import torch

    _STATE.clear()
    torch.manual_seed(parameters["seed"])
    model = _STATE["model"] = _built(parameters["model"])
    _STATE["config"] = parameters["model"]
    _keep_weights()
    return {"next_draw": torch.rand(1).item(), "weights": checksums(model.state_dict())}, {}


def checksums(state):
    """Return for every tensor its sum, its absolute sum (in float64) and a digest of its bytes."""
    rows = {}
    for name, value in state.items():
        wide = value.detach().double()
        digest = hashlib.sha256(value.detach().contiguous().numpy().tobytes()).hexdigest()
        rows[name] = [wide.sum().item(), wide.abs().sum().item(), digest]
    return rows


def _load(_parameters, tensors):
    _STATE["model"].load_state_dict(tensors, strict=True)
    _keep_weights()
    return {}, {}


def _keep_weights():
    _STATE["weights"] = {name: value.clone() for name, value in _STATE["model"].state_dict().items()}


# ---- parts -------------------------------------------------------------------------------------------------------


def _features(parameters, tensors):
    import torch

    model = _model(parameters["train"])
    audio = tensors["audio"].clone()
    torch.manual_seed(parameters["seed"])
    features, lengths = model.preprocessor(input_signal=audio, length=tensors["audio_len"])
    changed = (audio - tensors["audio"]).abs().max().item()
    return {"caller_changed_by": changed}, {"features": features, "lengths": lengths}


def _masks(parameters, _tensors):
    import torch
    from nemo.collections.asr.modules import RandomBlockMasking

    masks, draws = {}, []
    for number, case in enumerate(parameters["cases"]):
        masking = RandomBlockMasking(feat_in=2, **case["masking"])
        lengths = torch.tensor(case["lengths"])
        torch.manual_seed(case["seed"])
        _, mask = masking(input_feats=torch.zeros(len(lengths), 2, case["frames"]), input_lengths=lengths)
        masks[str(number)] = mask[:, 0].to(torch.uint8)
        draws.append(torch.rand(1).item())
    return {"next_draws": draws}, masks


def _quantizer_of(parameters):
    import torch
    from nemo.collections.asr.modules import RandomProjectionVectorQuantizer

    if "quantizer" not in parameters:
        return _STATE["model"].quantizer
    torch.manual_seed(parameters["seed"])
    wanted = {key: value for key, value in parameters["quantizer"].items() if key != "_target_"}
    return RandomProjectionVectorQuantizer(**wanted)


def _tokens(parameters, tensors):
    """Quantize one utterance at a time, as NeMo's table of differences takes 1 MB per token."""
    import torch

    quantizer = _quantizer_of(parameters)
    rows = [quantizer(input_signal=row[None])[1] for row in tensors["features"]]
    weights = {"proj": quantizer.proj.weight, "codebooks": quantizer.codebooks} if "quantizer" in parameters else {}
    return {}, {"tokens": torch.cat(rows), **weights}


def _encoder_with(changes):
    """Return the encoder of the model with some of its settings changed."""
    from nemo.collections.asr.modules import ConformerEncoder

    if not changes:
        return _model(train=False).encoder
    settings = {key: value for key, value in (_STATE["config"]["encoder"] | changes).items() if key != "_target_"}
    encoder = ConformerEncoder(**settings)
    encoder.load_state_dict(_model(train=False).encoder.state_dict())
    return encoder


def _encode(parameters, tensors):
    import torch

    encoder = _encoder_with(parameters["changes"])
    encoder.train(parameters["train"])
    found = {}

    def keep(name):
        def hook(_module, _inputs, output):
            found[name] = output[0] if isinstance(output, tuple) else output

        return hook

    hooks = [encoder.pre_encode.register_forward_hook(keep("pre_encode"))]
    hooks += [layer.register_forward_hook(keep(f"layers.{n}")) for n, layer in enumerate(encoder.layers)]
    torch.manual_seed(parameters["seed"])
    with torch.no_grad():
        encoded, lengths = encoder(audio_signal=tensors["features"], length=tensors["lengths"])
    draw = torch.rand(1).item()
    for hook in hooks:
        hook.remove()
    if parameters["train"]:
        found |= {name: value for name, value in encoder.state_dict().items() if ".batch_norm.running_" in name}
    return {"next_draw": draw}, found | {"encoded": encoded, "encoded_len": lengths}


def _decode(_parameters, tensors):
    import torch

    with torch.no_grad():
        return {}, {"log_probs": _model(train=False).decoder(encoder_output=tensors["encoded"])}


def _masked_loss(_parameters, tensors):
    loss = _STATE["model"].loss(
        masks=tensors["masks"].to(tensors["log_probs"].dtype),
        decoder_outputs=tensors["log_probs"],
        targets=tensors["tokens"],
        decoder_lengths=tensors["lengths"],
    )
    return {}, {"loss": loss}


# ---- the whole model ---------------------------------------------------------------------------------------------


def _forward_of(model, batch, seed):
    """Run NeMo's forward pass and loss on one batch, with copies of the waveforms: dither changes them in place."""
    import torch

    torch.manual_seed(seed)
    log_probs, lengths, masks, tokens = model(
        input_signal=batch["clean"].clone(),
        input_signal_length=batch["clean_len"],
        noisy_input_signal=batch["noisy"].clone(),
        noisy_input_signal_length=batch["noisy_len"],
        apply_mask=True,
    )
    loss = model.loss(masks=masks, decoder_outputs=log_probs, targets=tokens, decoder_lengths=lengths)
    return loss, masks


def _forward(parameters, tensors):
    import torch

    model = _model(parameters["train"])
    with torch.no_grad():
        loss, masks = _forward_of(model, tensors, parameters["seed"])
    return {"next_draw": torch.rand(1).item()}, {"loss": loss, "mask": masks[:, 0].to(torch.uint8)}


def _gradients(parameters, tensors):
    model = _model(train=True)
    loss, _ = _forward_of(model, tensors, parameters["seed"])
    loss.backward()
    found = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    return {}, {"loss": loss} | {f"gradients.{name}": value for name, value in found.items()}


def _train(parameters, tensors):
    """Run optimiser steps from the kept weights, with NeMo's optimiser and schedule."""
    from nemo.core.optim.lr_scheduler import NoamAnnealing

    model = _built(parameters["model"])
    model.load_state_dict(_STATE["weights"])
    model.train()
    optim = copy.deepcopy(parameters["optim"])
    sched = optim.pop("sched")
    sched.pop("name")
    optimizer = model.setup_optimization(_config(optim))[0]
    if isinstance(optimizer, list):
        optimizer = optimizer[0]
    schedule = NoamAnnealing(optimizer, **{key: value for key, value in sched.items() if value is not None})
    settings = optimizer_settings(optimizer)
    losses, rates = [], []
    for number, seed in enumerate(parameters["seeds"]):
        batch = {name: tensors[f"{number % parameters['batches']}.{name}"] for name in _BATCH}
        rates.append(optimizer.param_groups[0]["lr"])
        loss, _ = _forward_of(model, batch, seed)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    facts = {"losses": losses, "rates": rates, "settings": settings}
    return facts, {f"state.{name}": value for name, value in model.state_dict().items()}


def optimizer_settings(optimizer):
    """Return an optimiser's class, the sizes of its groups and the settings that determine its steps.

    Settings that only choose how the steps are computed (such as fused) are left out.
    """
    deciding = ("betas", "eps", "weight_decay", "amsgrad", "maximize", "initial_lr")
    found = {"class": type(optimizer).__name__}
    for number, group in enumerate(optimizer.param_groups):
        found[f"group {number}: parameters"] = len(group["params"])
        found |= {f"group {number}: {key}": group[key] for key in deciding}
    return json.loads(json.dumps(found))


_BATCH = ("clean", "clean_len", "noisy", "noisy_len")


# ---- augmentation ------------------------------------------------------------------------------------------------


def _augment(parameters, tensors):
    """Mix the batch of every case (tensors "<case>.audio" and so on). An exception from NeMo becomes a fact."""
    from nemo.collections.asr.data.ssl_dataset import AudioNoiseBatch
    from nemo.collections.asr.modules import ssl_modules

    facts, found = [], {}
    for number, case in enumerate(parameters["cases"]):
        given = {name: tensors[f"{number}.{name}"].clone() for name in ("audio", "audio_len", "noise", "noise_len")}
        before = {name: value.clone() for name, value in given.items()}
        random.seed(case["seed"])
        try:
            mixed = getattr(ssl_modules, case["class"])(**case["arguments"])(AudioNoiseBatch(**given))
        except (IndexError, ValueError, RuntimeError, ZeroDivisionError) as error:
            facts.append({"error": f"{type(error).__name__}: {error}"})
            continue
        changed = [name for name, value in given.items() if not value.equal(before[name])]
        facts.append({"next_draw": random.random(), "caller_changed": changed})
        for name in ("noise", "noise_len", "noisy_audio", "noisy_audio_len"):
            found[f"{number}.{name}"] = getattr(mixed, name)
    return {"cases": facts}, found


def _sample_noise(parameters, _tensors):
    """Return noise clips that NeMo's loader draws from one line of a noise manifest."""
    import numpy
    from nemo.collections.asr.data.ssl_dataset import sample_noise

    numpy.random.seed(parameters["seed"])
    clips, lengths = {}, []
    for number in range(parameters["draws"]):
        clip, length = sample_noise([parameters["line"]], 16000, parameters["samples"])
        clips[str(number)] = clip
        lengths.append(int(length))
    return {"lengths": lengths}, clips


# ---- files and the rest ------------------------------------------------------------------------------------------


def _save(_parameters, _tensors):
    """Return the bytes of the .nemo file that NeMo writes for the kept model."""
    import numpy
    import torch

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "nemo.nemo"
        _model(train=False).save_to(str(path))
        return {}, {"archive": torch.from_numpy(numpy.fromfile(path, dtype=numpy.uint8))}


def _restore(parameters, tensors):
    """Restore the bytes of a .nemo file; return the loss of a batch and the names of weights that differ."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ours.nemo"
        tensors["archive"].numpy().tofile(path)
        model = _model_class().restore_from(str(path), map_location="cpu").eval()
    with torch.no_grad():
        loss, _ = _forward_of(model, tensors, parameters["seed"])
    theirs = model.state_dict()
    kept = _STATE["weights"]
    differing = [name for name in kept if name not in theirs or not torch.equal(kept[name], theirs[name])]
    return {"differing": differing}, {"loss": loss}


def _shipped_yaml(_parameters, _tensors):
    """Return NeMo's nest_fast-conformer.yaml, unresolved, if this installation has it; the wheel does not."""
    import nemo
    from omegaconf import OmegaConf

    root = Path(nemo.__file__).parents[1]
    for path in (root / "examples/asr/conf/ssl/nest/nest_fast-conformer.yaml",):
        if path.is_file():
            return {"yaml": OmegaConf.to_container(OmegaConf.load(path), resolve=False), "path": path.name}, {}
    return {"yaml": None}, {}


def _cosine(parameters, tensors):
    """Return the error of the quantizer with cosine distance, or None."""
    try:
        _quantizer_of(parameters)(input_signal=tensors["features"])
    except RuntimeError as error:
        return {"error": str(error).splitlines()[0]}, {}
    return {"error": None}, {}


def _post_conv(parameters, tensors):
    """Return the error of a model that masks after the sub-sampling, or None."""
    import torch

    try:
        with torch.no_grad():
            _forward_of(_built(parameters["model"]).eval(), tensors, 0)
    except RuntimeError as error:
        return {"error": str(error).splitlines()[0]}, {}
    return {"error": None}, {}


def _hello(_parameters, _tensors):
    import nemo
    import torch
    from nemo.collections.asr.modules import RandomBlockMasking

    takes = list(inspect.signature(RandomBlockMasking.__init__).parameters)
    return {"nemo": nemo.__version__, "torch": torch.__version__, "masking": takes}, {}


OPERATIONS = {
    "hello": _hello,
    "shipped_yaml": _shipped_yaml,
    "structure": _structure,
    "build": _build,
    "load": _load,
    "features": _features,
    "masks": _masks,
    "tokens": _tokens,
    "encode": _encode,
    "decode": _decode,
    "masked_loss": _masked_loss,
    "forward": _forward,
    "gradients": _gradients,
    "train": _train,
    "augment": _augment,
    "sample_noise": _sample_noise,
    "save": _save,
    "restore": _restore,
    "cosine": _cosine,
    "post_conv": _post_conv,
}


# ---- the conversation --------------------------------------------------------------------------------------------


def main(folder):
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # NeMo and its dependencies print to standard output, which is reserved for answers
    with contextlib.suppress(BrokenPipeError):
        for number, line in enumerate(requests):
            answers.write(json.dumps(_reply(json.loads(line), Path(folder) / f"answer-{number}.safetensors")) + "\n")
            answers.flush()
    shutil.rmtree(folder, ignore_errors=True)  # the process that sent the requests has ended, perhaps killed


def _reply(request, path):
    try:
        from safetensors.torch import load_file, save_file

        tensors = load_file(request["tensors"]) if request.get("tensors") else {}
        facts, found = answer(request["operation"], request["parameters"], tensors)
        if found:
            save_file(found, path)
        return {"facts": facts, "tensors": str(path) if found else None}
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"[:2000]}


if __name__ == "__main__":
    # Python puts this file's folder first in sys.path, where our nemo.py would hide NeMo.
    sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).resolve().parent]
    main(sys.argv[1])
