"""Preferences (DPO) with LoRA on a LLaMA, by trl: trl 1.16.0, peft 0.21.2."""

from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

words = {
    word: number
    for number, word in enumerate(["<pad>", "<eos>", *(f"w{number}" for number in range(8000))])
}
tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"
)
config = LlamaConfig(
    vocab_size=8002,
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=6,
    num_attention_heads=8,
)
texts = [" ".join(f"w{number + place}" for place in range(100)) for number in range(64)]
data = Dataset.from_dict({"prompt": texts, "chosen": texts, "rejected": texts[::-1]})
arguments = DPOConfig(
    "/tmp/fits-dpo", per_device_train_batch_size=4, report_to=[], save_strategy="no"
)
DPOTrainer(
    AutoModelForCausalLM.from_config(config),
    args=arguments,
    train_dataset=data,
    processing_class=tokenizer,
    peft_config=LoraConfig(task_type="CAUSAL_LM"),
).train()
