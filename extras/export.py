"""
A trained model as a Hugging Face folder, or as a checkpoint in a quarter of its bytes. Called by `sample.py --export`
and `--slim`. The numbers are the same there; names, shapes and configuration files differ. That all of it fits is
tested by letting transformers load the folder and compute the same logits.
"""
import json
import math
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn as nn

from plumbing.files import replace_folder, say
from plumbing.linear import LoRALinear
from plumbing.weights import LLAVA_NAMES, QWEN_NAMES, hub_names, write_safetensors
from model import VLM, Attention, VLMConfig
from tokenizer import Tokenizer
from vision import MOST_TILES, MOST_TOKENS, grids_of


def export(folder, vlm: VLM, tokenizer, decoder_only: bool = False, dtype=torch.bfloat16) -> None:
    """
    Write a Hugging Face folder that transformers and serving engines load: a LLaVA (bridge "mlp"), or the decoder alone
    as a Qwen2 or Qwen3. Other bridges exist only in this project; the decoder beside them can be exported.
    """
    folder, config = Path(folder), vlm.config
    if not decoder_only and config.bridge.kind != "mlp":
        raise ValueError(f"Hugging Face has no model with a {config.bridge.kind} bridge: train with --bridge=mlp, "
                         "or export the decoder alone by --decoder_only")
    if not decoder_only and bool(config.vision.tiles) != config.bridge.newline:
        # Hugging Face's LLaVA never cuts a picture, its LLaVA-OneVision always does.
        say(f"note: trained with --tiles={config.vision.tiles}, but other programs will show it pictures "
            + ("in tiles" if config.bridge.newline else "in one piece"))
    tokenizer.save_hub(folder, config.decoder.max_position_embeddings)
    decoder = asdict(config.decoder)
    kind = "qwen3" if decoder.pop("use_qk_norm") else "qwen2"  # neither has our field; the type says it
    text = {**decoder, "model_type": kind, "architectures": [f"{kind.title()}ForCausalLM"],
            "hidden_act": "silu", "use_sliding_window": False, "torch_dtype": str(dtype).removeprefix("torch."),
            "bos_token_id": tokenizer.endoftext, "eos_token_id": tokenizer.im_end, "pad_token_id": tokenizer.endoftext}
    files = {"config.json": text, "generation_config.json": {
        "eos_token_id": list(tokenizer.stop_ids), "pad_token_id": tokenizer.endoftext,
        "do_sample": config.generation.get("temperature", 0) > 0, **config.generation}}
    if not decoder_only:
        files |= llava_files(config, text, tokenizer.image_pad)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    tensors = hub_tensors(vlm.gpt, QWEN_NAMES) if decoder_only else hub_tensors(vlm, LLAVA_NAMES)
    write_safetensors({name: t.to(dtype) for name, t in tensors.items()}, folder / "model.safetensors",
                      {"format": "pt"})


def slim(folder, vlm: VLM, tokenizer: Tokenizer) -> None:
    "A checkpoint to share: bfloat16 instead of float32, no optimizer. It answers, and training can start from it."
    with replace_folder(folder) as new:
        (new / "config.json").write_text(json.dumps({"model_type": "ghostvis", **asdict(vlm.config)}, indent=2) + "\n")
        tokenizer.save(new)
        write_safetensors({name: p.bfloat16() for name, p in vlm.named_parameters()},
                                  new / "model.safetensors", {"format": "pt"})


def hub_tensors(module: nn.Module, table: dict, prefix: str = "") -> dict[str, torch.Tensor]:
    "The inverse of load_tensors: the module's weights under the hub's names and in its shapes."
    tensors, parameters = {}, dict(module.named_parameters())
    for ours, theirs in hub_names(module, table, prefix).items():
        if ".lora_" in ours:  # part of its matrix, see merged
            continue
        value, owner = parameters[ours].detach(), module.get_submodule(ours.rpartition(".")[0])
        if isinstance(owner, LoRALinear) and ours.endswith("weight"):
            value = owner.merged().detach()
        if ours.endswith("patch.weight"):  # flat here, a convolution's [D, 3, P, P] there
            P = math.isqrt(value.shape[1] // 3)
            value = value.view(len(value), 3, P, P)
        # Stacked ones are cut apart: the decoder's query, key and value by their heads, all others into equal parts.
        owner = module.get_submodule(ours.rsplit(".", 2)[0]) if len(theirs) > 1 else None
        sizes = owner.sizes if isinstance(owner, Attention) else [len(value) // len(theirs)] * len(theirs)
        tensors |= dict(zip(theirs, value.split(sizes)))
    return tensors


def llava_files(config: VLMConfig, text: dict, image_pad: int) -> dict[str, dict]:
    "The JSON files of a LLaVA or LLaVA-OneVision folder, by name."
    # With tiles it is a LLaVA-OneVision, which brings its own image processor; without, a LLaVA with SigLIP's.
    vision, tiled, mean = config.vision, config.bridge.newline, [0.5, 0.5, 0.5]
    side, name = vision.image_size, "LlavaOnevision" if config.bridge.newline else "Llava"
    pinpoints = [[h * side, w * side] for h, w in grids_of(vision.tiles or MOST_TILES ** 2)]
    layout = {"image_grid_pinpoints": pinpoints, "vision_aspect_ratio": f"anyres_max_{MOST_TOKENS}"} if tiled else {}
    return {
        "config.json": {
            "model_type": "llava_onevision" if tiled else "llava", "architectures": [f"{name}ForConditionalGeneration"],
            "image_token_index": image_pad, "projector_hidden_act": "gelu", "multimodal_projector_bias": True,
            "vision_feature_layer": config.bridge.layer, "vision_feature_select_strategy": "full",
            "image_seq_length": vision.num_patches, "tie_word_embeddings": text["tie_word_embeddings"],
            "torch_dtype": text["torch_dtype"], "text_config": text, **layout,
            "vision_config": {
                "model_type": "siglip_vision_model", "vision_use_head": False, "hidden_act": "gelu_pytorch_tanh",
                **{name: value for name, value in asdict(vision).items() if name not in ("bicubic", "pad", "tiles")}}},
        "preprocessor_config.json": {
            "image_processor_type": f"{name}ImageProcessor" if tiled else "SiglipImageProcessor",
            "processor_class": f"{name}Processor", "do_resize": True, "size": {"height": side, "width": side},
            "resample": 3 if vision.bicubic else 2, "do_rescale": True, "rescale_factor": 1 / 255,
            "do_normalize": True, "image_mean": mean, "image_std": mean, "do_convert_rgb": True, **layout},
        "processor_config.json": {
            "processor_class": f"{name}Processor", "vision_feature_select_strategy": "full",
            **({"num_image_tokens": vision.num_patches, "image_token": "<image>", "video_token": "<video>"} if tiled
               else {"patch_size": vision.patch_size, "image_token": "<|image_pad|>",
                     "num_additional_image_tokens": 0})},
    }
