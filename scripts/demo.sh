#!/usr/bin/env bash
# A first look, on invented texts: teach a small model kindness and insults, merge two models by
# precision, subtract the insults by every method, then remove them by an adaptation. Makes .venv if
# it is missing. Needs a few minutes, and no GPU and no account.

cd "$(dirname "$0")/.." || exit 1
. scripts/venv.sh
install_project

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
bmerge=.venv/bin/bmerge
world=runs/tiny
run() {
    echo "+ $*" >&2
    "$@" || fail "failed: $*"
}

run .venv/bin/python scripts/tiny_world.py -o "$world"

# Two fine-tunes of one base on different subjects, averaged by precision as .safetensors files.
for subject in garden kitchen; do
    if [ ! -d "$world/$subject" ]; then
        run "$bmerge" finetune configs/finetune/tiny-world.yaml -q \
            --set "data=$world/texts/${subject}_train.jsonl" --set "output=$world/$subject"
    fi
    cp "$world/$subject/model.safetensors" "$world/$subject.safetensors"
    cp "$world/$subject/posterior/precision.posterior" "$world/$subject.posterior"
done
run "$bmerge" merge "$world/garden.safetensors" "$world/kitchen.safetensors" --weights precision \
    -o "$world/both.safetensors" --force

run "$bmerge" detox configs/detox/demo.yaml

# The same removed in some seconds, held by 256 rows of other text, until a goal is reached.
run "$bmerge" adapt configs/adapt/remove.yaml --force
run "$bmerge" evaluate "$world/base" "$world/kinder" --toxicity "$world/texts/prompts.jsonl" \
    --scorer "words:$world/texts/insults.txt" --continuations 25 --new-tokens 14 \
    --perplexity "civil text=$world/texts/kind_test.jsonl" \
    --perplexity "gardens=$world/texts/garden_test.jsonl" \
    --perplexity "crossed=$world/texts/crossed_test.jsonl" -o runs/side-by-side --force
echo "pictures: runs/detox-demo/toxicity_vs_perplexity.png, runs/side-by-side/evaluation.png" >&2
