from .data import Prompt, quoted_words as target_text, read_prompts, write_prompts  # noqa
