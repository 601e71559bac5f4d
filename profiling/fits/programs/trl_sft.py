"""Supervised fine-tuning of a Qwen by trl: trl 1.16.0, transformers 5.24.0."""

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config
from trl import SFTConfig, SFTTrainer

words = {
    word: number
    for number, word in enumerate(["<pad>", "<eos>", *(f"w{number}" for number in range(8000))])
}
tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"
)
config = Qwen2Config(
    vocab_size=8002,
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=2,
)
texts = [" ".join(f"w{number + place}" for place in range(200)) for number in range(64)]
arguments = SFTConfig(
    "/tmp/fits-sft", per_device_train_batch_size=8, max_length=256, report_to=[], save_strategy="no"
)
SFTTrainer(
    AutoModelForCausalLM.from_config(config),
    arguments,
    train_dataset=Dataset.from_dict({"text": texts}),
    processing_class=tokenizer,
).train()
