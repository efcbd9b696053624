"""What keeps the words of HunyuanVideo's captions apart while its bundled model is trained."""

import torch
from torch.nn import functional

from scripts.toyworld.train.hunyuan_video import LIKENESS, WORDS_APART
from scripts.toyworld.train.options import FAMILIES

CAPTIONS = ["a red circle", "a red square"]


def denoiser():
    torch.manual_seed(0)
    return FAMILIES["hunyuan_video"].denoiser()


def test_it_is_the_mean_cross_entropy_of_the_valid_tokens():
    one, captions = denoiser(), ["a red circle", "a red square moving around on a navy background"]
    with torch.no_grad():
        found = one.caption_loss(captions)
        text, _, _ = one.embed(captions)
        losses = []
        for row, caption in zip(text, captions, strict=True):
            numbers = one.tokenizer(caption).input_ids
            cosines = functional.cosine_similarity(row[: len(numbers), None], one.words[None], dim=-1)
            losses.append(
                functional.cross_entropy(LIKENESS * cosines, torch.tensor(numbers), reduction="none")
            )
    torch.testing.assert_close(found, WORDS_APART * torch.cat(losses).mean())


def test_it_moves_two_shapes_apart_and_nothing_but_the_text():
    one = denoiser()
    optimizer = torch.optim.Adam(one.parameters(), lr=1e-3)

    def angle() -> float:
        with torch.no_grad():
            text, _, _ = one.embed(CAPTIONS)
            return functional.cosine_similarity(text[0, 2], text[1, 2], dim=0).arccos().rad2deg().item()

    with torch.no_grad():  # as near as they came without it
        table = one.text_encoder.get_input_embeddings().weight
        circle, square = one.tokenizer("circle square").input_ids[:2]
        table[square] = table[circle] + 0.01 * (table[square] - table[circle])
    before = angle()
    for _ in range(100):
        optimizer.zero_grad()
        one.caption_loss(CAPTIONS).backward()
        optimizer.step()
    assert before < 5 and angle() > 60
    assert all(weight.grad is None for weight in one.transformer.parameters())
