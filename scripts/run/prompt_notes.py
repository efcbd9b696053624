"""Says what of a prompt a model does not get: text beyond its tokenizers' limits, unknown words."""

import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from radial_attn.models.pipeline.families import FAMILIES
from radial_attn.models.pipeline.load import is_local
from scripts.run.config import Config, GenerationConfig
from scripts.run.families import PLAIN_TEMPLATE, halves

SMALL = 10**5  # bytes of a file that may hold a vocabulary of words
SHOWN = 60  # characters of a part that is cut


def texts_of(generation: GenerationConfig, family: str, prompts: Mapping[int, str]) -> dict[str, str]:
    """Returns the prompts of a run, as of `read_prompts`, and its negative prompt, by what to call them."""
    texts = {f"line {number}" if number else "the prompt": text for number, text in prompts.items()}
    if halves(family, generation) > 1:
        texts["generation.negative_prompt"] = generation.negative_prompt
    return texts


def notes_of_run(path: str, config: Config, prompts: Mapping[int, str], *, fetch: bool) -> list[str]:
    """Returns the lines of `prompt_notes` on the prompts of a run, as of `read_prompts`."""
    texts = texts_of(config.generation, config.model.family, prompts)
    plain = config.generation.prompt_template == "plain"
    return prompt_notes(path, config.model.family, texts, plain=plain, fetch=fetch)


def prompt_notes(
    path: str, family: str, texts: Mapping[str, str], *, plain: bool = False, fetch: bool = False
) -> list[str]:
    """Returns a line for each tokenizer that cuts a text, and one for words that it does not know.

    Args:
        path: folder or hub id of the model.
        texts: by what to call them.
        plain: leaves out HunyuanVideo's template of a prompt.
        fetch: downloads a tokenizer that is needed; without it one that is not here is not asked.
    """
    notes = []
    for name, limit in FAMILIES[family].text.items():
        long = {key: text for key, text in texts.items() if not text.isascii() or len(text) >= limit - 2}
        tokenizer = _tokenizer(path, name, fetch) if long else None
        if tokenizer is not None:
            start, crop = ("", 0) if plain or name != "tokenizer" else _template(family)
            cut = {key: _cut(tokenizer, start, text, limit + crop) for key, text in long.items()}
            notes += _first(cut, f"{name} passes on {limit} tokens; it cuts, from {{key}}: {{text}}")
    if tokenizer := _vocabulary(path):
        ordered = sorted(tokenizer.get_vocab(), key=tokenizer.token_to_id)
        known = " ".join(word for word in ordered if word.isalpha())
        unknown = {key: _unknown(tokenizer, text) for key, text in texts.items()}
        notes += _first(unknown, f"the model does not know, in {{key}}: {{text}}; its words: {known}")
    return notes


def _first(texts: Mapping[str, str], form: str) -> list[str]:
    """Returns one line on the first text that is not empty, with the number of others; none without any."""
    given = {key: text for key, text in texts.items() if text}
    more = f" (and {len(given) - 1} more)" if len(given) > 1 else ""
    return [form.format(key=f"{key}{more}", text=text) for key, text in given.items()][:1]


def _tokenizer(path: str, name: str, fetch: bool) -> Any:
    """Returns a tokenizer of the model; None if it is not here, or cannot be read (loading says why)."""
    import huggingface_hub
    from transformers import AutoTokenizer

    huggingface_hub.utils.logging.set_verbosity_error()  # the retries are many lines
    folder, part = (str(Path(path) / name), "") if is_local(path) else (path, name)
    for here in (True, False) if fetch and not is_local(path) else (True,):
        with suppress(Exception):  # the libraries share no class for what they cannot read
            return AutoTokenizer.from_pretrained(folder, subfolder=part, local_files_only=here)
    return None


def _template(family: str) -> tuple[str, int]:
    """Returns what a pipeline's module puts before a prompt, and by how many tokens the limit grows."""
    import diffusers

    module = sys.modules[getattr(diffusers, FAMILIES[family].pipeline).__module__]
    template = getattr(module, "DEFAULT_PROMPT_TEMPLATE", PLAIN_TEMPLATE)
    return template["template"].partition("{}")[0], template["crop_start"]


def _cut(tokenizer: Any, start: str, text: str, limit: int) -> str:
    """Returns the part of a text that is cut, shortened; "" if nothing is.

    The limit also counts the tokens of `start` before it, and those that the tokenizer adds, such as </s>.
    """
    before = len(tokenizer(start, verbose=False).input_ids)
    tokens = tokenizer(" ".join(text.split()), add_special_tokens=False, verbose=False).input_ids
    cut = tokenizer.decode(tokens[max(limit - before, 0) :], skip_special_tokens=True).strip()
    cut = cut if len(cut) <= SHOWN else f"{cut[:SHOWN]}..."
    return repr(cut) if cut else ""


def _vocabulary(path: str) -> Any:
    """Returns the tokenizer of a model with a vocabulary of words, as the bundled ones; None for others."""
    file = Path(path) / "tokenizer" / "tokenizer.json"
    if not file.is_file() or file.stat().st_size > SMALL:
        return None
    from tokenizers import Tokenizer, models

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception:  # its errors have no class; loading says what is wrong
        return None
    return tokenizer if isinstance(tokenizer.model, models.WordLevel) else None


def _unknown(tokenizer: Any, text: str) -> str:
    """Lists the words of a text that are not in the vocabulary."""
    encoded, unknown = tokenizer.encode(text), tokenizer.token_to_id(tokenizer.model.unk_token)
    spans = zip(encoded.ids, encoded.offsets, strict=True)
    strange = dict.fromkeys(text[begin:end] for number, (begin, end) in spans if number == unknown)
    return ", ".join(filter(str.isalnum, strange))
