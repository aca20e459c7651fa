"""
Use a trained model: ask about one picture, chat, answer about a whole folder, or export it for a serving engine.

    python sample.py --image cat.jpg                                  # describe it
    python sample.py --image cat.jpg --question "What colour is the cat?"
    python sample.py --chat                                           # a conversation; /image PATH shows a picture
    python sample.py --images holiday/ --out answers.jsonl            # a whole folder, one JSON line per picture
    python sample.py --model=llava-ov-0.5b --image photo.jpg          # a finished public model, downloaded once
    python sample.py --model=qwen2.5-0.5b-instruct --chat             # a language model without vision
    python sample.py --export=my_llava                                # the model as a Hugging Face folder, for serving
    python sample.py --slim=my_model                                  # the checkpoint in a quarter of its bytes

Standard output contains the answer alone, so that it can be piped; everything else goes to standard error. The
checkpoint is --init, or the one written last of --model's under --out_dir, or --model's released weights; before you
have trained anything, a tiny one that comes with the code. The prompt is made by the same `render` as in training: a
prompt that differs even slightly from what a model was trained on is the most common reason for bad answers.

Left out: a cache from one turn of a chat to the next; every answer computes the whole conversation again.
"""
import argparse
import json
import math
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path

import torch
import torch.nn as nn

import weights
from data import parse_flags, pick_device, run
from model import (FROM_SCRATCH, PRESETS, STAGES, Attention, LoRALinear, VLM, VLMConfig, check_name, checkpoints,
                   load_checkpoint, load_pretrained, respond)
from tokenizer import Tokenizer
from vision import MOST_TILES, MOST_TOKENS, ViTConfig, cut_tiles, load_image, preprocess
from weights import note

# A folder often contains other files too. They are recognised by their names: opening each one would take long.
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}

TINY = Path(__file__).with_name("assets") / "tiny"  # a small trained checkpoint that comes with the code

FLAGS = {  # name: (default, meaning); a type instead of a default: not given
    "image": ([], "picture to ask about; may be given several times"),
    "images": ("", "folder of pictures: ask about each, answers go to --out"),
    "question": ("Describe the picture.", "what to ask"),
    "chat": (False, "talk on the terminal"),
    "out": ("answers.jsonl", "with --images; pictures that it already answers are skipped"),
    "init": ("", "checkpoint folder; empty: the one written last under OUT_DIR/MODEL"),
    "model": ("", f"{', '.join(PRESETS)}, or a hub id, Org/Name; empty: tiny"),
    "out_dir": ("out", "where the stages keep their checkpoints"),
    "anyres": ("auto", "True: cut a large picture into tiles, ten times the tokens, and small print becomes legible "
                       "(only models like llava-ov-0.5b can); False; or auto: on a GPU"),
    "max_new_tokens": (256, "longest answer, in tokens"),
    # No numbers here: each released model has its publisher's (generation_config.json), ours are greedy.
    "temperature": (float, "0: always the most likely token; not given: the model's own, else 0"),
    "top_k": (int, "sample among the k most likely tokens; 0: all; not given: the model's own, else 0"),
    "top_p": (float, "sample among the fewest tokens that hold this share; not given: the model's own, else 1"),
    "repetition_penalty": (float, "above 1: words already used become less likely; not given: the model's own, else 1"),
    "seed": (0, "of sampling"),
    "batch_size": (16, "pictures at once, with --images"),
    "device": ("auto", "auto, cpu, cuda or mps"),
    "export": ("", "write the model into this new folder, in Hugging Face's form and bfloat16; no question is asked"),
    "decoder_only": (False, "with --export: the language model alone, as a Qwen2"),
    "slim": ("", "write the checkpoint into this new folder, in bfloat16 and without what only training needs"),
}


def check_flags(flags: argparse.Namespace) -> None:
    "Before the model is loaded: a wrong value or path should not cost that wait."
    if flags.model:
        check_name(flags.model)
    top_p, penalty = (1 if x is None else x for x in (flags.top_p, flags.repetition_penalty))
    if not 0 < top_p <= 1 or min(flags.temperature or 0, flags.top_k or 0) < 0 or penalty <= 0:
        raise ValueError("--top_p must be in 0 to 1, --temperature and --top_k from 0, --repetition_penalty above 0")
    if flags.anyres not in ("auto", "True", "False"):
        raise ValueError(f"--anyres={flags.anyres}: choose auto, True or False")
    for path in flags.image:
        if not Path(path).is_file():
            raise ValueError(f"{path}: no such image file")


def load(flags) -> tuple[VLM, Tokenizer]:
    device = pick_device(flags.device)
    # Half the bytes, and an answer is as fast as the weights can be read. Not on CPUs: most are far slower in bfloat16.
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    found = [] if flags.init else checkpoints(flags.out_dir, flags.model or "tiny")
    folder = flags.init or (found[0][0] if found else "" if flags.model else TINY)
    if folder:
        vlm = load_checkpoint(folder, device, dtype)
    elif flags.model in FROM_SCRATCH:  # training would begin with random weights; their answers are noise
        raise ValueError(f"no trained model under {flags.out_dir}/{flags.model}: train one by `python train_sft.py "
                         f"--model={flags.model}`, or name a checkpoint folder by --init=")
    else:  # text_only: an untrained bridge would give the decoder noise instead of the picture
        vlm, folder = load_pretrained(flags.model, device=device, dtype=dtype, text_only=True)
    # The tokenizer is in the folder of the weights: with another one's ids the same weights would write noise.
    tokenizer = Tokenizer.from_pretrained(folder)
    # Which of several models answers is easily mistaken, so it is printed; to standard error, as it is not the answer.
    run = vlm.config.run
    made = f": {run['stage']}, step {run['step']} of {run['steps']}, trained on {run['data']}, " \
           f"{time.strftime('%Y-%m-%d %H:%M', time.localtime(run['saved']))}" if "saved" in run else ""
    note(f"({folder}{made}; {device})")
    if folder == TINY:
        note(f"(nothing is trained under {flags.out_dir}/tiny yet: this small model comes with the code)")
    for older, its in found[1:]:
        if STAGES.index(its["stage"]) > STAGES.index(found[0][1]["stage"]) and older.name in STAGES:
            note(f"({older} is older: it did not start from this one; --init={older} asks it)")
    check_ability(vlm, folder, flags)
    return vlm.eval(), tokenizer


def check_ability(vlm: VLM, folder, flags) -> None:
    "One line instead of noise, where a model is asked for what it has not learned."
    asks, shows = flags.question != FLAGS["question"][0], bool(flags.image or flags.images)
    run = vlm.config.run
    learned, scratch = set(run.get("chapters", STAGES)), vlm.config.preset in FROM_SCRATCH
    if not learned & {"align", "sft", "rl"} and (shows or scratch):
        raise ValueError(f"{folder} has read text only and cannot see: run train_align.py and train_sft.py")
    if scratch and not learned & {"sft", "rl"} and (asks or flags.chat):
        raise ValueError(f"{folder} has learned to describe pictures, not to answer: run train_sft.py, or leave "
                         "--question out")
    if not (shows or flags.chat or flags.export or flags.slim) and (not asks or scratch and run.get("data") == "world"):
        raise ValueError("no picture to ask about: give one by --image=PATH (cat.jpg is there to try)")


# ----------------------------------------------------------------------------------------------------------------------
# Asking

def options(vlm: VLM, flags) -> dict:
    # What is given; else the publisher's; else generate's own defaults, greedy as in the evaluation: the answers shown
    # are the answers measured.
    given = {name: getattr(flags, name) for name in ("temperature", "top_k", "top_p", "repetition_penalty")
             if getattr(flags, name) is not None}
    return {"max_new_tokens": flags.max_new_tokens, **vlm.config.generation, **given}


def to_pixels(vlm: VLM, path, flags, alone: bool = True):
    "-> uint8 [3, S, S], or Tiles. alone: the conversation has no other picture."
    if vlm.vit is None:
        raise ValueError(f"{vlm.config.preset} cannot see: it is a language model, and its bridge is not trained; run "
                         f"`python train_align.py --model={vlm.config.preset}` and train_sft.py, or ask llava-ov-0.5b")
    # Size and filter belong to the checkpoint: its ViT was trained on pixels made in this way.
    config, image = vlm.config.vision, load_image(path)
    anyres = flags.anyres == "True" or (flags.anyres == "auto" and vlm.gpt.embed.weight.is_cuda)
    if anyres and alone and vlm.config.bridge.newline:  # LLaVA-OneVision was trained on tiles of single pictures only
        return cut_tiles(image, config.image_size, config.bicubic)
    return preprocess(image, config.image_size, config.bicubic, config.pad)


def user_message(question: str, images: int) -> dict:
    # Content may be a string, in which "<image>" marks a picture's place, or a list of parts. We use parts: what a user
    # types then stays text, even if it contains "<image>", and slots always match the pictures.
    # Pictures, a newline, the question: the order that the training data has. Without a picture, no newline.
    return {"role": "user",
            "content": [{"type": "image"}] * images + [{"type": "text", "text": "\n" * bool(images) + question}]}


def stream(vlm: VLM, tokenizer: Tokenizer, messages: list, pixels: list, flags) -> str:
    "Print the answer token by token, and return it."
    prompt = tokenizer.render(messages, list(map(vlm.config.bridge.tokens_of, pixels)), add_generation_prompt=True)
    ids, shown = [], ""
    # One row, so each step yields one id. The last may be a stop token; decode leaves special tokens out. vocab_used:
    # the embedding may have more rows than there are words.
    for (token,) in vlm.generate([prompt], pixels, stop=set(tokenizer.stop_ids), vocab_used=tokenizer.vocab_size,
                                 seeds=[flags.seed], **options(vlm, flags)):
        ids.append(token)
        text = tokenizer.decode(ids)  # all of them: a single token may be a part of a character, and no text by itself
        # U+FFFD at the end is an incomplete character (an emoji has 4 bytes, often in several tokens). A terminal
        # cannot take it back, so it waits until the next tokens complete it.
        if not text.endswith("\ufffd"):
            print(text[len(shown):], end="", flush=True)  # without flush, a pipe shows nothing before the end
            shown = text
    text = tokenizer.decode(ids)
    print(text[len(shown):])  # the rest of a character that the answer did not complete
    return text


def chat(vlm: VLM, tokenizer: Tokenizer, flags) -> None:
    # Only answers go to standard output, so `--chat < questions.txt > answers.txt` works.
    print("Type a question. /image PATH shows a picture, /reset starts over, /quit ends.", file=sys.stderr)
    # pixels: all pictures of the conversation so far. waiting: those shown since the last question, which go before the
    # next one.
    messages, pixels, waiting = [], [], [to_pixels(vlm, path, flags, alone=False) for path in flags.image]
    while True:
        # Not input("> "): it would write its prompt to standard output.
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()  # "" only at the end of input (Ctrl-D); an empty line is "\n"
        if not line or line.strip() == "/quit":
            return
        command, _, rest = line.strip().partition(" ")
        if command == "/image":
            try:
                waiting.append(to_pixels(vlm, rest.strip(), flags, alone=False))
                print("(picture loaded; ask about it)", file=sys.stderr)
            except ValueError as error:  # a mistyped path should not cost the conversation so far
                print(f"error: {error}", file=sys.stderr)
        elif command == "/reset":
            messages, pixels, waiting = [], [], []
        elif command:  # anything else is a question, an unknown /word too
            messages.append(user_message(line.strip(), len(waiting)))
            pixels, waiting = pixels + waiting, []
            answer = stream(vlm, tokenizer, messages, pixels, flags)
            # The answer as parts too: a model may write "<image>" as well.
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})


def answer_folder(vlm: VLM, tokenizer: Tokenizer, flags) -> None:
    "Every picture of a folder -> one line of --out: a JSON object with its answer, or with the error if it is broken."
    root, out = Path(flags.images), Path(flags.out)
    if not root.is_dir():
        raise ValueError(f"--images={root}: no such folder")
    # A large folder takes hours. A run that was stopped continues: what --out answers already is skipped. The question
    # is part of the key: another question is other work. Lines with an error do not count: those are tried again.
    done = set()
    if out.exists():
        # A line cut off by a crash is an error that names the file. Appending after it would spoil the next line too.
        with weights.named_errors(out):
            done = {(row["image"], row["question"])
                    for row in map(json.loads, out.read_text(encoding="utf-8").splitlines()) if "answer" in row}
    # Relative to the folder: it may be moved, and a.png in two subfolders stays two pictures. Sorted: the file system's
    # order differs from machine to machine.
    names = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not names:
        raise ValueError(f"--images={root}: no pictures there ({', '.join(sorted(IMAGE_SUFFIXES))})")
    names, failed = [name for name in names if (name, flags.question) not in done], 0
    # Append, never rewrite: nothing that goes wrong later can harm the answers that are there.
    with open(out, "a", encoding="utf-8") as file:
        for at in range(0, len(names), flags.batch_size):
            rows = []
            for name in names[at:at + flags.batch_size]:
                try:
                    rows.append((name, to_pixels(vlm, root / name, flags)))
                except ValueError as error:
                    # One broken file among thousands must not end the run; its line says what is wrong with it.
                    failed += 1
                    print(f"error: {error}", file=sys.stderr)
                    file.write(json.dumps({"image": name, "question": flags.question, "error": str(error)}) + "\n")
            # A seed for each row, the same for all: an answer depends neither on the batch size nor on which pictures
            # share the batch, so a run that was stopped gives the same answers as one that was not. Where all pictures
            # of a batch are broken there is no row, and generate cannot take none.
            answers = respond(vlm, tokenizer, [[user_message(flags.question, 1)]] * len(rows),
                           [[pixels] for _, pixels in rows], seeds=[flags.seed] * len(rows),
                           **options(vlm, flags)) if rows else []
            # ensure_ascii=False: answers in any script stay readable in the file.
            for (name, _), answer in zip(rows, answers):
                file.write(json.dumps({"image": name, "question": flags.question, "answer": answer},
                                      ensure_ascii=False) + "\n")
            file.flush()  # a crash loses one batch at most
            print(f"{min(at + flags.batch_size, len(names))} of {len(names)} pictures", file=sys.stderr)
    # At the end, when all others are answered: exit code 1 tells a script that some are missing.
    if failed:
        raise ValueError(f"{failed} of {len(names)} pictures could not be read; {out} says which")


# ----------------------------------------------------------------------------------------------------------------------
# Export: into Hugging Face's form

def export(folder, vlm: VLM, tokenizer, decoder_only: bool = False, dtype=torch.bfloat16) -> None:
    """
    Write a Hugging Face folder that transformers and serving engines load: a LLaVA (bridge "mlp"), or the decoder alone
    as a Qwen2. Other bridges exist only in this project; the decoder beside them can be exported.
    """
    folder, config = Path(folder), vlm.config
    if not decoder_only and config.bridge.kind != "mlp":
        raise ValueError(f"Hugging Face has no model with a {config.bridge.kind} bridge: train with --bridge=mlp, "
                         "or export the decoder alone by --decoder_only")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder}: is not empty; give --export= a new folder")
    tokenizer.save_hub(folder, config.decoder.max_position_embeddings)
    text = {**asdict(config.decoder), "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"],
            "hidden_act": "silu", "use_sliding_window": False, "torch_dtype": str(dtype).removeprefix("torch."),
            "bos_token_id": tokenizer.endoftext, "eos_token_id": tokenizer.im_end, "pad_token_id": tokenizer.endoftext}
    files = {"config.json": text, "generation_config.json": {
        "eos_token_id": list(tokenizer.stop_ids), "pad_token_id": tokenizer.endoftext,
        "do_sample": config.generation.get("temperature", 0) > 0, **config.generation}}
    if not decoder_only:
        files |= llava_files(config, text, tokenizer.image_pad)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    tensors = hub_tensors(vlm.gpt, weights.QWEN_NAMES) if decoder_only else hub_tensors(vlm, weights.LLAVA_NAMES)
    weights.write_safetensors({name: t.to(dtype) for name, t in tensors.items()}, folder / "model.safetensors",
                      {"format": "pt"})


def slim(folder, vlm: VLM, tokenizer: Tokenizer) -> None:
    "A checkpoint to share: bfloat16 instead of float32, no optimizer. It answers, and training can start from it."
    if Path(folder).exists() and any(Path(folder).iterdir()):
        raise ValueError(f"{folder}: is not empty; give --slim= a new folder")
    with weights.replace_folder(folder) as new:
        (new / "config.json").write_text(json.dumps({"model_type": "ghostvis", **asdict(vlm.config)}, indent=2) + "\n")
        tokenizer.save(new)
        weights.write_safetensors({name: p.bfloat16() for name, p in vlm.named_parameters()},
                                  new / "model.safetensors", {"format": "pt"})


def hub_tensors(module: nn.Module, table: dict, prefix: str = "") -> dict[str, torch.Tensor]:
    "The inverse of weights.load_tensors: the module's weights under the hub's names and in its shapes."
    tensors, parameters = {}, dict(module.named_parameters())
    for ours, theirs in weights.hub_names(module, table, prefix).items():
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
    vision, tiled, mean = config.vision, config.bridge.newline, [0.5, 0.5, 0.5]
    side, name = vision.image_size, "LlavaOnevision" if config.bridge.newline else "Llava"
    pinpoints = [[h * side, w * side] for h in range(1, MOST_TILES + 1) for w in range(1, MOST_TILES + 1)]
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
                **{f.name: getattr(vision, f.name) for f in fields(ViTConfig) if f.name not in ("bicubic", "pad")}}},
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


def main() -> None:
    flags = parse_flags(__doc__, FLAGS)
    check_flags(flags)
    vlm, tokenizer = load(flags)
    if flags.export:
        export(flags.export, vlm, tokenizer, flags.decoder_only)
        note(f"wrote {flags.export}")
    elif flags.slim:
        slim(flags.slim, vlm, tokenizer)
        note(f"wrote {flags.slim}")
    elif flags.images:
        answer_folder(vlm, tokenizer, flags)
    elif flags.chat:
        chat(vlm, tokenizer, flags)
    else:  # several --image: all of them before the one question, in the order given
        stream(vlm, tokenizer, [user_message(flags.question, len(flags.image))],
               [to_pixels(vlm, path, flags, alone=len(flags.image) == 1) for path in flags.image], flags)


if __name__ == "__main__":
    run(main)
