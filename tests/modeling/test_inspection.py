"""What a model's configuration tells without its weights."""

from transformers import XLNetConfig, XLNetModel

from m2m_hf.modeling.inspection import positions


def test_a_model_without_a_longest_length_has_a_million_positions():
    assert positions(XLNetModel(XLNetConfig(vocab_size=9, d_model=8, n_layer=1, n_head=2, d_inner=8))) == 1_000_000
