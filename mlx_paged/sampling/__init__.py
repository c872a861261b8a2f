"""From logits to tokens: draws, beams and grammars."""
