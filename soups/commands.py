"""What each command is for, examples of it, which a test runs, and which settings belong together."""

EXAMPLES = {
    "uniform": """soups uniform run/*.safetensors --out soup.safetensors
soups uniform run/checkpoint-* --last 3 --out soup
soups uniform run/checkpoint-* --top 2 --by eval_loss --goal min --out soup
soups uniform run/checkpoint-* --keep '^classifier' --from run/checkpoint-1 --out soup""",
    "weighted": """soups weighted a.pt b.pt --weights 3,1 --out soup.pt
soups weighted run/checkpoint-* --weights 1-sqrt --out soup""",
    "wise-ft": "soups wise-ft run/*.safetensors --init start.safetensors --alpha 0.5 --out soup.safetensors",
    "greedy": """soups greedy run/*.ckpt --score 'python eval.py {soup}' --goal max --out soup.safetensors
soups greedy run/*.pt --score 'python eval.py {soup}' --report 'python eval.py --test {soup}' --goal max --out s.pt
soups greedy run/*.safetensors --score my_eval:accuracy --goal max --out soup.safetensors
soups greedy run/*.safetensors --images held_out --network timm:resnet50 --out soup.safetensors
soups greedy run/*.safetensors --images held_out --report test --min-sigma 1 --network timm:resnet50 --out soup.pt
soups greedy run/checkpoint-* --texts held_out.tsv --out soup
soups greedy llama-*/ --perplexity held_out.txt --out soup
soups greedy llama-*/ --choices questions.jsonl --out soup
torchrun --nproc-per-node 8 -m soups greedy run/*.safetensors --images held_out --network timm:resnet50 --out s.pt""",
    "random-order": "soups random-order run/*.pt --score my_eval:loss --goal min --seed 1 --out soup.pt",
    "with-replacement": "soups with-replacement run/*.pt --score my_eval:loss --goal min --rounds 10 --out soup.pt",
    "learned": "soups learned run/*.safetensors --images held_out --network timm:resnet50 --per layer --out s.pt",
    "model-stock": "soups model-stock run/*.safetensors --init start.safetensors --out soup.safetensors",
    "arithmetic": "soups arithmetic run/*.pt --init start.pt --scales 0.5,-0.2 --out soup.safetensors",
    "ties": "soups ties run/*.safetensors --init start.safetensors --density 0.2 --out soup.safetensors",
    "dare": "soups dare run/*.safetensors --init start.safetensors --density 0.1 --out soup.safetensors",
    "slerp": "soups slerp a.pt b.pt --t 0.3 --out soup.pt",
    "lora": """soups lora adapters/* --out adapter
soups lora adapters/* --rank 4 --out adapter
soups lora adapters/* --base llama --out model
soups greedy adapters/* --score 'python eval.py {soup}' --goal max --out adapter
soups greedy adapters/* --base llama --perplexity held_out.txt --out model""",
    "export": "soups export soup.safetensors --to timm --network timm:resnet50 --out exported",
    "doctor": """soups doctor run/*.safetensors --init start.safetensors
soups doctor run/*.safetensors --scores scores.json --held-out 616""",
    "make": """soups make recipe.yaml
soups make soup.safetensors.recipe.yaml --folder run --out again.safetensors
soups make mergekit.yaml --out merged --allow-unrelated""",
    "verify": "soups verify soup.safetensors --folder run",
}
TITLES = {
    "uniform": "the equal-weight mean of all models",
    "weighted": "the mean with a weight for each model",
    "wise-ft": "between the initialisation and the mean of the models",
    "greedy": "add models best-first, keeping each one that does not make the score worse (Recipe 1)",
    "random-order": "the same in a random order, scoring no model alone but the first",
    "with-replacement": "add the model that helps most, again and again; one added twice weighs twice",
    "learned": "learn how much each model weighs by gradient descent on held-out examples",
    "model-stock": "between the initialisation and the mean, as the angles between models say; needs no examples",
    "arithmetic": "the initialisation plus scaled changes of the models; scales may be negative",
    "ties": "trimmed changes that agree in sign, added to the initialisation",
    "dare": "random parts of the changes, scaled up, added to the initialisation",
    "slerp": "two models on the great circle between them, tensor by tensor",
    "lora": "one LoRA adapter whose update is the mean of the adapters' updates, or with --base the dense model",
    "export": "a soup as a folder that timm, open_clip, transformers or ONNX loads",
    "doctor": "whether models belong in one soup, and whether it is likely to be better than the best of them",
    "make": "make the soup of a recipe in a file: yours, mergekit's, or the one that lies beside a soup",
    "verify": "make a soup again from its ingredients and compare every byte",
}
OTHERS = ("export", "doctor", "make", "verify")  # which are no recipes
SETTINGS = (  # those that recipes in Python have under the same names
    *(
        "dtype",
        "batch_norm",
        "init",
        "key",
        "exclude",
        "kept_from",
        "only_common",
        "allow_unrelated",
        "threads",
        "base",
    ),
    *("weights", "alpha", "scales", "density", "scale", "seed", "goal", "scores", "ties", "rounds", "min_sigma"),
    *("per", "lr", "epochs", "weight_decay", "place", "t", "normalize", "rescale"),
)
USES = {  # settings of held-out examples -> where they mean something
    "goal": ("score",),
    "network": ("images", "texts", "perplexity", "choices"),
    "batch_size": ("images", "texts", "perplexity", "choices"),
    "image_size": ("images",),
    "templates": ("images",),
    "workers": ("images",),
    "metric": ("score", "images", "texts"),
    "columns": ("texts",),
    "label": ("texts",),
    "max_length": ("texts", "perplexity", "choices"),
    "per_token": ("choices",),
}
