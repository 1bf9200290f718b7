"""Which tensors of a network belong to one layer, told from their names."""

import re

_BLOCK = re.compile(r"^(?:.+?\.)??(?:(?:res)?blocks?|layers?|stages|h|layer\d+)\.\d+(?:(?:\.blocks)?\.\d+)*(?=\.)")
_BEFORE = re.compile(
    r"(?:^|\.)(?:\w*embed\w*|\w+_token|ln_pre|norm_pre|stem|conv_stem|conv1|bn1|shared|wte|wpe)(?:\.|$)"
)
_TOWER = re.compile(r"(?:^|\.)(visual|text)\.")


def layer_of(name: str) -> str:
    """The block that a tensor belongs to, by the path up to its index; else `embedding` or `head`.

    What stands before the first block (patch, position and token embeddings, stem) is the embedding and what comes
    after the last (final norm, projection, classifier, logit scale) the head; those of a tower keep its name.

    >>> layer_of("visual.transformer.resblocks.3.mlp.c_fc.weight"), layer_of("trunk.blocks.2.1.conv_pw.weight")
    ('visual.transformer.resblocks.3', 'trunk.blocks.2.1')
    >>> layer_of("visual.class_embedding"), layer_of("visual.proj"), layer_of("classification_head.weight")
    ('visual.embedding', 'visual.head', 'head')
    """
    block = _BLOCK.match(name)
    if block:
        return block.group()
    tower = _TOWER.search(name)
    place = "embedding" if _BEFORE.search(name) else "head"
    return f"{tower.group(1)}.{place}" if tower else place
