#!/usr/bin/env bash
# Removal on real text, from start to end: train the base (minutes of one core), subtract, measure.
# Needs the texts in ../shared/data, and scikit-learn for the scorer (part of the test extra).
# Run it again to resume.

cd "$(dirname "$0")/../.." || exit 1
. scripts/venv.sh
install_project test

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
data=../shared/data
if [ ! -f runs/comments/base/model.safetensors ]; then
    .venv/bin/python scripts/train_tiny_lm.py "$data/lm/comments/train.jsonl.gz" \
        "$data/lm/yelp_sentences/train.jsonl.gz" "$data/toxicity/civil/train.jsonl.gz?label=1*3" \
        -o runs/comments/base || fail "the base could not be trained."
fi
exec .venv/bin/bmerge detox configs/detox/comments-small.yaml "$@"
