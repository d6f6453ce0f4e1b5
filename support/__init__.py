"""What the lesson needs and does not teach: set-up, files, processes, logs.

May import: everything of ours. No loss and no advantage is defined here; of the method there are the sources of labels and the
controls of an experiment, beside what the top folder has.

setup.py run.py    from arguments to a run; what a run does around the method, one named call each
flags.py           how --help reads
batches.py         episodes laid end to end, and the part of them that a micro-batch needs
labels.py          the label sources, and controls.py what takes something away from them
critic.py          a language model as judge
label_table.py     which labels agree with the oracle, which credit rules punish flaws? label_figures.py draws it
warmup.py          before RL: a policy that never saw the classifier's question learns it
policies.py        the tiny policy; loading, saving, LoRA, half precision of any
language_models.py what --model may name besides a folder: smollm2, a .gguf file, a hub name
processes.py       several processes: shares of the work, sums over them, weights spread over them (FSDP)
checkpoints.py     checkpoints that appear complete or not at all; resuming
logs.py curves.py  what a run logs; curves.png from it
demonstrations.py  what experts do as training data, or as a chat dataset
tags.py            RLVMR's tags for what experts do
lesson.py          one real episode, from text to loss, as a page of tables
critiques.py       verdicts and their reasons, for a cold start that learns to judge
corrections.py     instructions against flaws that have become common
report.py          every step of every game as one page, from the template report.html
toy_figures.py     the four figures of toy_bandit.py
coupling_run.py    coupling.py's flags and episodes; coupling_report.py its tables, coupling_figures.py its pictures,
                   probes.py its probe set and kernel, representation.py what the layers make of them,
                   coupling_page.py one page of all that, coupling_dynamics.py leak and own correction while a policy learns
bench.py           speeds as ratios: python -m support.bench; bench_models.py those of a language model, bench_sizes.py those of
                   tiny policies of several shapes
"""
