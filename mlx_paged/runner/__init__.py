"""From a schedule to logits on the device."""
