"""stories260K, a real trained Llama of 260 thousand parameters, as a Hugging Face directory.

Reads the files of llama2.c (its version 0 layout and its tokenizer): seven int32, then float32 weights one kind
after the other. What is written loads with ``AutoModelForCausalLM`` and ``AutoTokenizer``: tests, the guide and the
result tables prune it as they would any other checkpoint.
"""

from __future__ import annotations

import math
import os
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from resu.core.io import FileFormatError
from resu.experiments.data import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["GREEDY_TEXT", "Llama2c", "read_checkpoint", "read_pieces", "write_hf_directory"]

# What the model says by itself, greedily, as llama2.c documents it.
GREEDY_TEXT = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a "
    "big, red ball. She wanted to play with it, but it was too high.\n"
    "Lily's mom said, \"Lily, let's go to the park.\" Lily was sad and didn't know what to do. She said, \"I want to "
    "play with your ball, but I can't find it.\"\n"
    "Lily was sad and didn't know what to do. She said, \"I'm sorry, Lily. I didn't know what to do.\"\n"
    "Lily didn't want to help her mom, so she said, \"I'm sorry, mom. I didn't know what to do.\" Her mom said, "
    "\"Don't worry, Lily. We can help you."
)

_HEADER = struct.Struct("<7i")
_PIECES = 259  # <unk>, <s>, </s> and the 256 bytes come first


@dataclass(frozen=True)
class Llama2c:
    """Sizes of a llama2.c checkpoint and its weights under Hugging Face's names.

    Attributes:
        config: Keyword arguments of ``transformers.LlamaConfig``.
        state_dict: float32, ``[out, in]``; query and key rows in Hugging Face's order.
    """

    config: dict[str, Any]
    state_dict: dict[str, Tensor]


def _halves(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows of a query or key projection from llama2.c's order to Hugging Face's.

    Rotary positions turn pairs of rows: neighbours (2i, 2i+1) of a head in llama2.c, (i, i + head_dim/2) in
    Hugging Face's Llama.
    """
    out, wide = weight.shape
    return weight.reshape(heads, out // heads // 2, 2, wide).swapaxes(1, 2).reshape(out, wide)


def read_checkpoint(path: str | os.PathLike[str]) -> Llama2c:
    """Read a llama2.c checkpoint (version 0, float32).

    Args:
        path: For example ``stories260K.bin``.

    Raises:
        FileFormatError: If the header makes no sense or the size of the file is not the one it implies.
    """
    data = Path(path).read_bytes()
    if len(data) < _HEADER.size:
        raise FileFormatError(f"{path} is too short for a llama2.c checkpoint ({len(data)} bytes)")
    dim, hidden, layers, heads, kv_heads, vocab, seq = _HEADER.unpack_from(data)
    tied, vocab = vocab > 0, abs(vocab)  # a negative size says that the output layer has weights of its own
    sane = min(dim, hidden, layers, heads, kv_heads, vocab, seq) > 0 and max(dim, hidden, vocab, seq) < 2**20
    if not sane or dim % (2 * heads) or heads % kv_heads:
        raise FileFormatError(f"{path} is no llama2.c checkpoint of version 0: its header gives impossible sizes")
    head_dim = dim // heads
    kv_dim = head_dim * kv_heads
    shapes: dict[str, tuple[int, ...]] = {
        "embed": (vocab, dim),
        "input_layernorm": (layers, dim),
        "self_attn.q_proj": (layers, dim, dim),
        "self_attn.k_proj": (layers, kv_dim, dim),
        "self_attn.v_proj": (layers, kv_dim, dim),
        "self_attn.o_proj": (layers, dim, dim),
        "post_attention_layernorm": (layers, dim),
        "mlp.gate_proj": (layers, hidden, dim),
        "mlp.down_proj": (layers, dim, hidden),
        "mlp.up_proj": (layers, hidden, dim),
        "norm": (dim,),
        "rotary": (2, seq, head_dim // 2),  # cosines and sines, which Hugging Face computes
    }
    if not tied:
        shapes["lm_head"] = (vocab, dim)
    expected = _HEADER.size + 4 * sum(math.prod(shape) for shape in shapes.values())
    if len(data) != expected:
        raise FileFormatError(
            f"{path} has {len(data)} bytes, its header implies {expected}: truncated or another layout"
        )
    values = np.frombuffer(data, "<f4", offset=_HEADER.size)
    state: dict[str, Tensor] = {}
    start = 0
    for name, shape in shapes.items():
        array = values[start : (start := start + math.prod(shape))].reshape(shape)
        if name == "embed":
            state["model.embed_tokens.weight"] = _tensor(array)
        elif name == "norm":
            state["model.norm.weight"] = _tensor(array)
        elif name == "lm_head":
            state["lm_head.weight"] = _tensor(array)
        elif name != "rotary":
            turned = {"self_attn.q_proj": heads, "self_attn.k_proj": kv_heads}.get(name)
            for index, weight in enumerate(array):
                state[f"model.layers.{index}.{name}.weight"] = _tensor(_halves(weight, turned) if turned else weight)
    config = {
        "vocab_size": vocab,
        "hidden_size": dim,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": seq,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return Llama2c(config, state)


def _tensor(array: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(np.array(array, dtype=np.float32, order="C"))


def read_pieces(path: str | os.PathLike[str], vocab: int) -> tuple[list[bytes], list[float]]:
    """The tokenizer's pieces and their merge scores, by token id.

    Args:
        path: For example ``tok512.bin``: an int32, then per token a float32 score, an int32 length and the bytes.
        vocab: How many tokens there must be.

    Raises:
        FileFormatError: If the file ends early, goes on, or does not begin with three special tokens and 256 bytes.
    """
    data = Path(path).read_bytes()
    pieces: list[bytes] = []
    scores: list[float] = []
    at = 4
    try:
        for _ in range(vocab):
            score, length = struct.unpack_from("<fi", data, at)
            piece = data[at + 8 : at + 8 + length]
            if length < 0 or len(piece) != length:
                raise FileFormatError(f"{path} is truncated in token {len(pieces)}")
            pieces.append(piece)
            scores.append(score)
            at += 8 + length
    except struct.error:
        raise FileFormatError(f"{path} is truncated: {len(pieces)} of {vocab} tokens") from None
    if at != len(data) or pieces[3:_PIECES] != [b"<0x%02X>" % i for i in range(256)]:
        raise FileFormatError(f"{path} is no llama2.c tokenizer of {vocab} tokens")
    return pieces, scores


def make_tokenizer(pieces: list[bytes], scores: list[float]) -> Tokenizer:
    """The same segmentation as a BPE of the ``tokenizers`` library: pairs merge in the order of their scores."""
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
    from tokenizers.models import BPE

    text = ["<unk>", "<s>", "</s>", *(piece.decode().replace(" ", "\u2581") for piece in pieces[3:])]
    vocab = {piece: index for index, piece in enumerate(text)}
    merges: list[tuple[float, int, int, str, str]] = []
    for index in range(_PIECES, len(text)):
        whole = text[index]
        for cut in range(1, len(whole)):
            left, right = whole[:cut], whole[cut:]
            if left in vocab and right in vocab:
                merges.append((-scores[index], vocab[left], vocab[right], left, right))
    merges.sort()
    tokenizer = Tokenizer(
        BPE(vocab=vocab, merges=[(m[3], m[4]) for m in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    return tokenizer


def write_hf_directory(data_folder: str | os.PathLike[str], out: str | os.PathLike[str]) -> Path:
    """Write stories260K as a Hugging Face directory.

    Args:
        data_folder: Holds ``stories260K.bin`` and ``tok512.bin``.
        out: A folder that does not exist yet, or is empty.

    Returns:
        ``out``, with ``config.json``, ``model.safetensors`` (tied embedding once), tokenizer and licence.

    Raises:
        DataError: If a file is missing.
        FileExistsError: If ``out`` holds something already.
        FileFormatError: If a file is damaged.
    """
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from resu.integrations.hf import quiet

    source, target = Path(data_folder), Path(out)
    for name in ("stories260K.bin", "tok512.bin"):
        if not (source / name).is_file():
            raise DataError(f"{source / name} is absent; give the folder that holds stories260K.bin and tok512.bin")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} is there already; name a new folder")
    found = read_checkpoint(source / "stories260K.bin")
    pieces, scores = read_pieces(source / "tok512.bin", found.config["vocab_size"])
    model = LlamaForCausalLM(LlamaConfig(**found.config, architectures=["LlamaForCausalLM"]))
    state = dict(found.state_dict)
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    model.load_state_dict(state)
    model.tie_weights()
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2)
    with quiet():
        model.save_pretrained(target)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=make_tokenizer(pieces, scores),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=found.config["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(target)
    if (source / "LICENSE").is_file():
        shutil.copyfile(source / "LICENSE", target / "LICENSE")
    return target
