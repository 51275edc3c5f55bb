"""`flashi2v-train init`: from a folder of videos and a model to the files of a run.

videos.look        reads the videos and their captions, and opens some of them
base.find          what to start from: its architecture, its parts, what must be downloaded
proposal.propose   size, frames and rate that fit videos and model, and which clips that keeps
memory.fit         the batch, and what saves memory, that a device can hold
words.extend       of a small model: a tokenizer that knows the captions' words, and rows for them
files.Plan         filter.yaml, data.json, model.json, run.sh, of templates
"""
