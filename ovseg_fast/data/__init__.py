"""What models are trained and evaluated on: class lists."""

from __future__ import annotations

from .vocabularies import COCO_STUFF, PASCAL_CONTEXT, PASCAL_VOC, VOCABULARIES, Vocabulary

__all__ = ["COCO_STUFF", "PASCAL_CONTEXT", "PASCAL_VOC", "VOCABULARIES", "Vocabulary"]
