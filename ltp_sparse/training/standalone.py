"""Labels a text or a pair of texts with torch and transformers only: python predict.py TEXT [SECOND TEXT].

In Python: transformers.pipeline("text-classification", FOLDER). If config.json names this file, pass
trust_remote_code=True, since its code builds the model's input.
"""

import string
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer, Pipeline, pipeline


def encode(tokenizer, prompt, texts):
    """Token ids: the parts of the template, each encoded on its own, between <s> and </s>. Long texts are cut."""
    special = set(tokenizer.all_special_ids)
    parts = {"{prompt}": list(prompt["slots"]), "{mask}": [tokenizer.mask_token_id]}
    for part in prompt["parts"]:
        if part not in parts:
            parts[part] = tokenizer(part, add_special_tokens=False)["input_ids"]
    marks = marks_of(prompt)
    if len(texts) != len(marks):
        raise ValueError(f"expected {len(marks)} texts ({' and '.join(marks)}), got {len(texts)}")
    for mark, text in zip(marks, texts, strict=True):
        ids = tokenizer(text.rstrip(string.punctuation) or text, add_special_tokens=False)["input_ids"]
        parts[mark] = [tokenizer.unk_token_id if token in special else token for token in ids]
    first, second = parts[marks[0]], parts[marks[-1]]
    while sum(len(parts[part]) for part in prompt["parts"]) > prompt["max_length"] - 2:
        cut_second = second if prompt["truncation"] == "hypothesis_first" else len(second) >= len(first)
        (second if cut_second else first).pop()
    ids = [token for part in prompt["parts"] for token in parts[part]]
    return [tokenizer.cls_token_id, *ids, tokenizer.sep_token_id]


def marks_of(prompt):
    """The places of texts in the template."""
    return [mark for mark in ("{premise}", "{hypothesis}", "{text}") if mark in prompt["parts"]]


class PromptPipeline(Pipeline):
    """Scores classes by the mean logit of their words at <mask>, with the interface of text-classification."""

    def _sanitize_parameters(self, top_k=1):
        return {}, {}, {"top_k": top_k}

    def __call__(self, inputs, **options):
        found = super().__call__(inputs, **options)
        return [found] if isinstance(inputs, str) and "top_k" not in options else found

    def preprocess(self, inputs):
        if isinstance(inputs, dict):
            inputs = [inputs[key] for key in ("text", "text_pair") if key in inputs]
        texts = [inputs] if isinstance(inputs, str) else inputs
        ids = torch.tensor([encode(self.tokenizer, self.model.config.prompt, texts)], dtype=torch.long, device="cpu")
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def _forward(self, inputs):
        hidden = self.model.roberta(**inputs).last_hidden_state
        at_mask = self.model.lm_head(hidden[inputs["input_ids"] == self.tokenizer.mask_token_id]).float()
        words = self.model.config.prompt["words"]
        return {"logits": torch.stack([at_mask[:, of_class].mean(-1) for of_class in words], dim=-1)}

    def postprocess(self, outputs, top_k=1):
        names = self.model.config.id2label
        scores = [{"label": names[i], "score": p} for i, p in enumerate(outputs["logits"][0].softmax(-1).tolist())]
        scores.sort(key=lambda score: score["score"], reverse=True)
        return scores[0] if top_k == 1 else scores[:top_k]


def load(folder):
    """The pipeline of this folder."""
    config = AutoConfig.from_pretrained(folder)
    if not hasattr(config, "prompt"):
        return pipeline("text-classification", str(folder))
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    return PromptPipeline(model=model.eval(), tokenizer=tokenizer)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    given = dict(zip(("text", "text_pair"), sys.argv[1:], strict=False))
    labeller = load(Path(__file__).resolve().parent)
    if isinstance(labeller, PromptPipeline):
        marks = marks_of(labeller.model.config.prompt)
        if len(given) != len(marks):
            sys.exit(f"expected {len(marks)} texts ({' and '.join(marks)}), got {len(given)}, for one example")
    for score in labeller(given, top_k=None):
        print(f"{score['label']}\t{score['score']:.4f}")
