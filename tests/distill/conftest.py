import pytest
import torch

TEXT = "the quick brown fox jumps over the lazy dog; " * 200


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """A folder with a tiny teacher, a student of its shape, its hybrid, and text to learn from."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from zebra.data import byte_tokenizer
    from zebra.init.convert import convert

    root = tmp_path_factory.mktemp("pair")
    for seed, name in enumerate(("teacher", "student")):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=272,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            bos_token_id=256,
            eos_token_id=257,
            pad_token_id=258,
            initializer_range=0.2,
        )
        LlamaForCausalLM(config).save_pretrained(root / name)
        byte_tokenizer().save_pretrained(root / name)
    layers = ["mamba2", "mla", "attention"]
    convert(root / "teacher", layers, kv_lora_rank=16).save_pretrained(root / "hybrid")
    byte_tokenizer().save_pretrained(root / "hybrid")
    (root / "text.txt").write_text(TEXT)
    return root
