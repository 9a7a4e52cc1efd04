"""Toxicity of sampled continuations as a task of lm-eval, scored by any scorer of ours.

    lm_eval --model hf --model_args pretrained=MODEL --tasks bmerge_toxicity \\
        --include_path "$(python -m mergekit_bayes.lm_eval_task)" \\
        --metadata '{"prompts": "prompts.jsonl", "scorer": ["words:list.txt"]}'
"""
