"""A small model and a small text encoder that generation's tests share."""

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from scamo.models.prefix_lm import PrefixLM

WORDS = ["<pad>", "</s>", "<unk>", "a", "person", "walks", "runs", "jumps", "in", "circle", "slowly"]


@pytest.fixture(scope="session")
def make_model():
    """make_model(config): weights drawn from seed 0, moved a little so that no norm is all ones."""

    def make(config):
        torch.manual_seed(0)
        model = PrefixLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model.eval()

    return make


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    """The folder of a random BERT of width 12."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    bert = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=12, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=32,
    )  # fmt: skip
    transformers.BertModel(bert).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder
