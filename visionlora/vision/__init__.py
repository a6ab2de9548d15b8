"""Classification with vision transformers: what is learned, how it is measured, what it looks at."""
