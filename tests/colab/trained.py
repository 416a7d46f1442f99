"""A tiny checkpoint with weights and a tokenizer, as somebody might have saved it: quality needs both."""

import sys
from pathlib import Path

import tokenizers
import transformers

config, text, folder = sys.argv[1:]
transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(config)).save_pretrained(folder)
bpe = tokenizers.ByteLevelBPETokenizer()
bpe.train_from_iterator([Path(text).read_text()], vocab_size=500, show_progress=False)
transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer).save_pretrained(folder)
