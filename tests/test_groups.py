"""Layers by name, on the names of the networks that are souped."""

import pytest

from soups.descent import layer_of


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("cls_token", "embedding"),  # timm ViT
        ("patch_embed.proj.weight", "embedding"),
        ("norm_pre.weight", "embedding"),
        ("blocks.0.norm1.weight", "blocks.0"),
        ("blocks.11.attn.qkv.weight", "blocks.11"),
        ("norm.weight", "head"),
        ("head.bias", "head"),
        ("visual.class_embedding", "visual.embedding"),  # open_clip CLIP
        ("visual.conv1.weight", "visual.embedding"),
        ("visual.ln_pre.bias", "visual.embedding"),
        ("visual.transformer.resblocks.3.attn.in_proj_weight", "visual.transformer.resblocks.3"),
        ("model.visual.transformer.resblocks.11.mlp.c_fc.bias", "model.visual.transformer.resblocks.11"),
        ("visual.ln_post.weight", "visual.head"),
        ("visual.proj", "visual.head"),
        ("transformer.resblocks.3.ln_1.weight", "transformer.resblocks.3"),
        ("token_embedding.weight", "embedding"),
        ("positional_embedding", "embedding"),
        ("text_projection", "head"),
        ("logit_scale", "head"),
        ("trunk.conv_stem.weight", "embedding"),  # efficientnet
        ("trunk.bn1.running_mean", "embedding"),
        ("trunk.blocks.2.1.conv_pw.weight", "trunk.blocks.2.1"),
        ("trunk.blocks.2.1.bn1.running_var", "trunk.blocks.2.1"),
        ("trunk.conv_head.weight", "head"),
        ("bert.embeddings.word_embeddings.weight", "embedding"),  # BERT
        ("bert.encoder.layer.3.attention.self.query.weight", "bert.encoder.layer.3"),
        ("bert.pooler.dense.weight", "head"),
        ("classifier.weight", "head"),
        ("encoder.block.3.layer.0.SelfAttention.q.weight", "encoder.block.3"),  # T5
        ("shared.weight", "embedding"),
        ("decoder.block.3.layer.1.EncDecAttention.v.weight", "decoder.block.3"),
        ("layer2.0.downsample.0.weight", "layer2.0"),  # ResNet
        ("stages.2.blocks.5.conv_dw.weight", "stages.2.blocks.5"),  # ConvNeXt
    ],
)
def test_a_tensor_belongs_to_the_layer_that_its_name_says(name, layer):
    assert layer_of(name) == layer
