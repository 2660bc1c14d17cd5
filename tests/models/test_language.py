"""Language models, texts in blocks of tokens, and their perplexity."""

import math

import pytest
import torch
from torch import nn

import pruneutils as pu
from pruneutils import _torchvision


class Recurrent(nn.Module):
    """A language model of eleven tokens whose outputs depend on all tokens before."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embedding, self.memory, self.head = (
                nn.Embedding(11, 8),
                nn.GRU(8, 8, batch_first=True),
                nn.Linear(8, 11),
            )

    def forward(self, input_ids, attention_mask=None):
        return 5 * self.head(self.memory(self.embedding(input_ids))[0])


TOKENS = torch.randint(11, (5, 7), generator=torch.Generator().manual_seed(1))


def loss(model, text, position):
    return -model(text[None, :position])[0, -1].log_softmax(-1)[text[position]].item()


@pytest.mark.parametrize("stride", [None, 1, 4])
def test_perplexity_is_a_hand_written_sum(stride):
    model, text, done, losses = Recurrent(), TOKENS.flatten(), 0, []
    for start in range(0, 29, stride or 7):
        losses += [loss(model, text[start:], position - start) for position in range(max(done, start + 1), start + 7)]
        done = start + 7
    assert len(losses) == (34 if stride else 30)
    assert pu.perplexity(model, TOKENS, stride) == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)


def test_padded_tokens_do_not_count():
    model, padded = Recurrent(), TOKENS * (torch.arange(7) < 4)
    batch = {"input_ids": padded, "attention_mask": (torch.arange(7) < 4).expand(5, 7).long()}
    assert pu.perplexity(model, [batch, batch]) == pytest.approx(pu.perplexity(model, TOKENS[:, :4]), rel=1e-5)


def test_perplexity_and_texts_refuse_what_they_cannot_use(tmp_path):
    for tokens, stride, message in [
        (TOKENS[:, :1], None, "no token to predict"),
        (TOKENS, 7, "stride=7 must be less"),
    ]:
        with pytest.raises(ValueError, match=message):
            pu.perplexity(Recurrent(), tokens, stride)
    (tmp_path / "text").write_text("äb" * 10, encoding="utf-8")
    assert pu.data.text(tmp_path / "text", length=6).tolist() == [[195, 164, 98] * 2] * 5
    words = pu.data.text("python", lambda text: {"input_ids": [len(word) for word in text.split()]}, length=50)
    assert words.shape[1] == 50 and words.dtype == torch.int64 and len(words) > 100
    with pytest.raises(ValueError, match="has 30 tokens, and a block has length=31"):
        pu.data.text(tmp_path / "text", length=31)
    with pytest.raises(FileNotFoundError, match="no text 'nowhere'"):
        pu.data.text("nowhere")


@pytest.mark.filterwarnings("ignore")
def test_a_llama_from_a_folder_is_pruned_by_batches_as_language_models_take_them(tmp_path):
    _torchvision.load()  # transformers imports it
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4)
    config = transformers.LlamaConfig(vocab_size=11, num_key_value_heads=2, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({str(n): n for n in range(11)}, unk_token="0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    model, tokenizer = pu.models.language(tmp_path)
    (tmp_path / "text").write_text(" ".join(map(str, TOKENS.flatten().tolist())))
    assert torch.equal(pu.data.text(tmp_path / "text", tokenizer, length=7), TOKENS)
    batch = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}
    masks = pu.prune(model, "wanda", 0.5, "output", data=batch, exclude="lm_head")
    assert len(masks) == 14 and all((mask.sum(1) == mask.shape[1] / 2).all() for mask in masks.values())
    assert 1 < pu.perplexity(model, batch) == pytest.approx(pu.perplexity(model, TOKENS))
