"""The only room with torch: tokens, models, fits under Ray Train, and the losses that are recorded from them."""
