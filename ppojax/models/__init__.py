"""Models: decoder, critics, weights in and out, tokenizers. Outside, a model is a `ModelDef` and a dict."""
