"""Masks from boxes and clicks: GrabCut on any machine, SAM 2 where its weights are, and instance folders made of them."""
