# The DAG of the experiments. Every shell line is the papermill line that a person types in this folder.
#
#   snakemake --cores 2                                  # all of it, at the demo preset
#   snakemake --cores 2 --config preset=smoke run=try    # another size, another folder of runs/
#   snakemake --profile profiles/slurm --config preset=paper
#   snakemake --profile profiles/slurm --config preset=paper processes=8   # each training shared by eight GPUs of one machine
#   snakemake --cores 2 virtual                          # the report on the virtual cohort; not part of `all`
#   snakemake --cores 2 build_mimic                      # a cohort of a made-up archive, likewise; of real files: type the notebook's own line
#   snakemake --cores 2 synthetic                        # three virtual cines for each training ECG; not part of `all`
#   snakemake --cores 2 obedience                        # does the generator obey the ECG (chapter 15a); not part of `all`
#   snakemake --cores 2 few_steps                        # quality against the number of steps; not part of `all`
#   snakemake --cores 2 baselines                        # the systems of Table 1, trained (31); not part of `all`
#   snakemake --cores 2 table1                           # Table 1 and Figure 3 (40); trains the systems first
#   snakemake --cores 2 ablation noise_scale             # Figure 2(a) and 2(b) (41, 42)
#   snakemake --cores 2 table2 table3 table4             # what synthetic cines are good for (50, 51, 52): jobs of method x task x folds, side by side
#   snakemake --cores 2 table2 --config systems="harmonic videogpt" ratios="100 200 300" controls="longer augmented"   # whose cines, how many per cent, which rows beside them
#   snakemake --cores 2 screening label_efficiency subtypes   # CardiacNets' Figures 2 and 3 (62 to 64); trains its streams and its aligned encoder first (60, 61)
#   snakemake --cores 2 turing_test reader_study         # pages for readers, and what machine readers say (43, 66); answers of people: type the notebook's own line
#   snakemake --cores 2 phenotypes_from_generated        # CardiacNets' Fig. 4: what is read from its generated cines (65)
#   snakemake --cores 2 paper                            # Tables 1 to 4 and Figures 2 and 3 beside the paper's numbers (90); with virtual hearts, and not at smoke, in figures/ as well (publish=True, False)
#   snakemake --cores 2 papers                           # and those of CardiacNets
#   snakemake --cores 2 real_ecgs                        # a page of real ECGs; of the files that ECGFLOWCMR_FIXTURES names
#   snakemake --cores 2 cost                             # what the full run would cost
#   snakemake --cores 2 benchmarks_generator             # how fast the generator is, on a GPU if there is one; on a quiet machine
#   snakemake --cores 1 benchmarks                       # how fast, beside the peers' way; not part of `all`, on a quiet machine

import hashlib
import re
import shlex
from pathlib import Path

config.setdefault("preset", "demo")
RUN = str(config.get("run") or config["preset"])
SMOKE = config["preset"] == "smoke"
BOTH = 1 if SMOKE else 2   # cores of a training; what takes seconds is run two at a time
KNOBS = " ".join(f"-p {k} {shlex.quote(str(config[k]))}" for k in ("preset", "recipe", "cohort", "run", "seed", "settings") if config.get(k, "") != "")
TABLE_KNOBS = " ".join(f"-p {k} {shlex.quote(str(config[k]))}" for k in ("preset", "cohort", "run", "seed") if config.get(k, "") != "")   # all recipes are rows of the table
READ = " ".join(f"-p {k} {shlex.quote(str(config[k]))}" for k in ("preset", "recipe", "cohort", "run", "seed") if config.get(k, "") != "")   # chapters that take no `settings`
CARDIACNETS = " ".join(f"-p {k} {shlex.quote(str(config[k]))}" for k in ("preset", "recipe", "cohort", "run", "seed") if config.get(k, "") not in ("", "harmonic"))   # the second paper's stages have no recipe of ours
SIZES = f" -p settings {shlex.quote(str(config['sizes']))}" if config.get("sizes") else ""   # of fine-tuning: tables 2 to 4, CardiacNets' figures
BUILD = " ".join(f"-p {k} {config[k]}" for k in ("preset", "run", "seed") if config.get(k, "") != "")
PROCESSES = int(config.get("processes", 1))
MANY = f"torchrun --standalone --nproc-per-node {PROCESSES} --no-python " if PROCESSES > 1 else ""   # for the rules that train
if unknown := set(config) - {"preset", "recipe", "cohort", "run", "seed", "settings", "processes", "systems", "ratios", "controls", "synthetic", "sizes", "publish"}:
    raise WorkflowError(f"unknown configuration {sorted(unknown)}; valid are preset, recipe, cohort, run, seed, settings, processes; of tables 2 to 4: systems, ratios, controls, synthetic, sizes (also of screening, label_efficiency, subtypes, phenotypes_from_generated); of paper and papers: publish")


def code(notebook):
    "The notebook and the exported files that it rests on, however deep; what only starts or reports a run is left out."
    seen, todo = set(), [Path("nbs")/f"{notebook}.ipynb"]
    while todo:
        if (file := todo.pop()) in seen: continue
        seen.add(file)
        for dots, name in re.findall(r"from (?:ecgflowcmr)?(\.+)([\w.]+) import", file.read_text(encoding="utf-8")):
            home = Path("ecgflowcmr") if file.suffix == ".ipynb" else file.parents[len(dots) - 1]
            target = (home/name.replace(".", "/")).with_suffix(".py")
            if target.name not in ("cli.py", "experiment.py"): todo.append(target)
    return sorted(map(str, seen))


rule all:
    input: f"runs/{RUN}/generate/done.json"

rule virtual:
    input: code("21_virtual_cohort")
    output: f"runs/{RUN}/virtual/done.json"
    log: f"runs/{RUN}/21_virtual_cohort.ipynb"
    threads: BOTH
    params: KNOBS
    shell: "papermill nbs/21_virtual_cohort.ipynb {params}"

rule benchmarks:
    input: code("95_benchmarks")
    output: f"runs/{RUN}/benchmarks/done.json"
    log: f"runs/{RUN}/95_benchmarks.ipynb"
    threads: workflow.cores
    params: KNOBS
    shell: "papermill nbs/95_benchmarks.ipynb {params}"

rule benchmarks_generator:
    input: code("95_benchmarks")
    output: f"runs/{RUN}/benchmarks_generator/done.json"
    log: f"runs/{RUN}/95_benchmarks.ipynb"
    threads: workflow.cores
    resources: gpu=1
    params: KNOBS
    shell: "papermill nbs/95_benchmarks.ipynb -p section generator {params}"

rule build_ukbiobank:
    input: code("22_build_ukbiobank")
    output: f"runs/{RUN}/build_ukbiobank/done.json"
    log: f"runs/{RUN}/22_build_ukbiobank.ipynb"
    threads: BOTH
    params: BUILD
    shell: "papermill nbs/22_build_ukbiobank.ipynb {params}"

rule build_mimic:
    input: code("23_build_mimic")
    output: f"runs/{RUN}/build_mimic/done.json"
    log: f"runs/{RUN}/23_build_mimic.ipynb"
    threads: BOTH
    params: BUILD
    shell: "papermill nbs/23_build_mimic.ipynb {params}"

rule build_hospital:
    input: code("24_build_hospital")
    output: f"runs/{RUN}/build_hospital/done.json"
    log: f"runs/{RUN}/24_build_hospital.ipynb"
    threads: BOTH
    params: BUILD
    shell: "papermill nbs/24_build_hospital.ipynb {params}"

rule pamae:
    input: code("20_pamae_train")
    output: f"runs/{RUN}/pamae/done.json"
    log: f"runs/{RUN}/20_pamae_train.ipynb"
    threads: BOTH
    priority: 30
    resources: gpu=PROCESSES
    params: KNOBS
    shell: MANY + "papermill nbs/20_pamae_train.ipynb {params}"

rule cmr_mim:
    input: code("60_cmr_mim_train")
    output: f"runs/{RUN}/cmr_mim/done.json"
    log: f"runs/{RUN}/60_cmr_mim_train.ipynb"
    threads: BOTH
    resources: gpu=PROCESSES
    params: CARDIACNETS
    shell: MANY + "papermill nbs/60_cmr_mim_train.ipynb {params}"

rule alignment:
    input: code("61_alignment_train"), rules.cmr_mim.output
    output: f"runs/{RUN}/alignment/done.json"
    log: f"runs/{RUN}/61_alignment_train.ipynb"
    threads: BOTH
    resources: gpu=PROCESSES
    params: CARDIACNETS
    shell: MANY + "papermill nbs/61_alignment_train.ipynb {params}"

rule alignment_harmonic:
    input: code("61_alignment_train")
    output: f"runs/{RUN}/alignment_harmonic/done.json"
    threads: BOTH
    resources: gpu=PROCESSES
    params: CARDIACNETS
    shell: MANY + f"papermill nbs/61_alignment_train.ipynb runs/{RUN}/61_alignment_harmonic.ipynb {{params}} -p recipe harmonic"

rule screening:
    input: code("62_screening"), rules.alignment.output, rules.alignment_harmonic.output
    output: f"runs/{RUN}/screening/done.json"
    log: f"runs/{RUN}/62_screening.ipynb"
    threads: BOTH
    resources: gpu=PROCESSES
    params: CARDIACNETS + SIZES
    shell: MANY + "papermill nbs/62_screening.ipynb {params}"

rule label_efficiency:
    input: code("63_label_efficiency"), rules.alignment.output, rules.alignment_harmonic.output
    output: f"runs/{RUN}/label_efficiency/done.json"
    log: f"runs/{RUN}/63_label_efficiency.ipynb"
    threads: BOTH
    resources: gpu=PROCESSES
    params: CARDIACNETS + SIZES
    shell: MANY + "papermill nbs/63_label_efficiency.ipynb {params}"

rule subtypes:
    input: code("64_subtypes"), rules.alignment.output, rules.alignment_harmonic.output
    output: f"runs/{RUN}/subtypes/done.json"
    log: f"runs/{RUN}/64_subtypes.ipynb"
    threads: BOTH
    resources: gpu=PROCESSES
    params: CARDIACNETS + SIZES
    shell: MANY + "papermill nbs/64_subtypes.ipynb {params}"

rule vae:
    input: code("25_vae_train")
    output: f"runs/{RUN}/vae/done.json"
    log: f"runs/{RUN}/25_vae_train.ipynb"
    threads: BOTH
    priority: 30
    resources: gpu=PROCESSES
    params: KNOBS
    shell: MANY + "papermill nbs/25_vae_train.ipynb {params}"

rule amdf:
    input: code("30_amdf_train"), rules.pamae.output, rules.vae.output
    output: f"runs/{RUN}/amdf/done.json"
    log: f"runs/{RUN}/30_amdf_train.ipynb"
    threads: BOTH
    priority: 30
    resources: gpu=PROCESSES
    params: KNOBS
    shell: MANY + "papermill nbs/30_amdf_train.ipynb {params}"

rule generate:
    input: code("35_generate"), rules.amdf.output
    output: f"runs/{RUN}/generate/done.json"
    log: f"runs/{RUN}/35_generate.ipynb"
    threads: BOTH
    resources: gpu=1
    params: KNOBS
    shell: "papermill nbs/35_generate.ipynb {params}"

rule synthetic:
    input: code("35_generate"), rules.amdf.output
    output: f"runs/{RUN}/synthetic/done.json"
    log: f"runs/{RUN}/35_generate.ipynb"
    threads: BOTH
    resources: gpu=PROCESSES
    params: KNOBS
    shell: MANY + "papermill nbs/35_generate.ipynb -p per_subject 3 -p split train {params}"

rule obedience:
    input: code("32_obedience"), rules.amdf.output
    output: f"runs/{RUN}/obedience/done.json"
    log: f"runs/{RUN}/32_obedience.ipynb"
    threads: BOTH
    resources: gpu=1
    params: KNOBS
    shell: "papermill nbs/32_obedience.ipynb {params}"

rule few_steps:
    input: code("33_few_steps"), rules.amdf.output
    output: f"runs/{RUN}/few_steps/done.json"
    log: f"runs/{RUN}/33_few_steps.ipynb"
    threads: BOTH
    resources: gpu=1
    params: KNOBS
    shell: "papermill nbs/33_few_steps.ipynb {params}"

# Stages of one name and other settings stand side by side (`amdf`, `amdf-HASH`), the first of them under the plain name: the run's own generator (30), which rule amdf looks for. So whatever trains others of that name comes after it: Table 1's harmonic row, the ablations, and the noise scales, which share a row with the ablations.
SYSTEMS = "videogpt modelscope cardionets echopulse crossmodal released paper harmonic".split()  # ecg2cmr (13d) rests on two trainings of the second paper (60, 61), longer than all others together: by name, `-p systems ...`

rule baselines:
    input: expand(f"runs/{RUN}/baseline-{{system}}.done", system=SYSTEMS)

rule baseline:
    input: code("31_baseline_train"), rules.pamae.output, rules.vae.output, lambda w: dict(ecg2cmr=rules.alignment.output, harmonic=rules.amdf.output).get(w.system, [])
    output: touch(f"runs/{RUN}/baseline-{{system}}.done")
    wildcard_constraints: system="|".join([*SYSTEMS, "ecg2cmr"])
    threads: 1  # the same seconds of one core for each: two at once take half the time
    priority: 20
    resources: gpu=PROCESSES
    params: TABLE_KNOBS
    shell: MANY + f"papermill nbs/31_baseline_train.ipynb runs/{RUN}/31_{{wildcards.system}}.ipynb -p system {{wildcards.system}} {{params}}"

rule table1:
    input: code("40_generation_quality"), rules.baselines.input
    output: f"runs/{RUN}/table1/done.json"
    log: f"runs/{RUN}/40_generation_quality.ipynb"
    threads: BOTH
    resources: gpu=1
    params: TABLE_KNOBS
    shell: "papermill nbs/40_generation_quality.ipynb {params}"

rule phenotypes_from_generated:
    input: code("65_phenotypes_from_generated"), rules.alignment.output, f"runs/{RUN}/baseline-ecg2cmr.done", f"runs/{RUN}/baseline-crossmodal.done", f"runs/{RUN}/baseline-harmonic.done"
    output: f"runs/{RUN}/phenotypes_generated/done.json"
    log: f"runs/{RUN}/65_phenotypes_from_generated.ipynb"
    threads: BOTH
    resources: gpu=1
    params: CARDIACNETS + SIZES
    shell: "papermill nbs/65_phenotypes_from_generated.ipynb {params}"

rule ablation:
    input: code("41_ablation"), rules.amdf.output
    output: f"runs/{RUN}/ablation/done.json"
    log: f"runs/{RUN}/41_ablation.ipynb"
    threads: BOTH
    priority: 10
    resources: gpu=1
    params: TABLE_KNOBS
    shell: "papermill nbs/41_ablation.ipynb {params}"

rule noise_scale:
    input: code("42_noise_scale"), rules.amdf.output, rules.ablation.output
    output: f"runs/{RUN}/noise_scale/done.json"
    log: f"runs/{RUN}/42_noise_scale.ipynb"
    threads: BOTH
    resources: gpu=1
    params: TABLE_KNOBS
    shell: "papermill nbs/42_noise_scale.ipynb {params}"

# Tables 2 to 4. The generators come first (those of Table 1: no stage is trained by two rules); then an encoder for each method, with its phenotypes; then the folds.
# Lists are given with -r: with -p, one ratio alone would be a number to papermill, and the notebooks want text.
# A mark of a job stands in a folder named after what the job depends on, and that of a table after its rows as well, so that another configuration finds its own and leaves the others; the tables are kept in runs/RUN/table2, table2-HASH ..., and the last one that was asked for stands in figures/, which `paper` reads.
DRAWERS, RATIOS, CONTROLS = (str(config.get(k, usual)).split() for k, usual in dict(systems="harmonic", ratios="100" if SMOKE else "100 300", controls="longer").items())
if unknown := set(CONTROLS) - {"longer", "augmented", "none"}: raise WorkflowError(f"controls: unknown {sorted(unknown)}; valid are longer, augmented, none")
if bad := [r for r in RATIOS if not r.isdigit()]: raise WorkflowError(f"ratios: {bad} are no whole per cents")
if "given" in DRAWERS and not config.get("synthetic"): raise WorkflowError("systems: given needs synthetic=FOLDER, a cohort that chapter 35 has drawn")
ROWS = {k.replace(":", "-"): k for k in ["linear", "vit", "mae_real", *(f"mae_real_{c}:{r}" for c in CONTROLS if c != "none" for r in RATIOS), *(f"mae_synthetic:{s}:{r}" for s in DRAWERS for r in RATIOS)]}   # as `methods_of` of chapter 16b
FOLDS = {} if SMOKE else {"a": "1 2", "b": "3 4 5"}   # a fold of smoke takes less time than its kernel: the tables train them
STUDY = TABLE_KNOBS + SIZES + (f" -r synthetic {shlex.quote(str(config['synthetic']))}" if config.get("synthetic") else "")
ALL_ROWS = f"-r systems {shlex.quote(' '.join(DRAWERS))} -r ratios {shlex.quote(' '.join(RATIOS))} -r controls {shlex.quote(' '.join(CONTROLS) or 'none')}"
named = lambda *what: hashlib.sha256(" ".join(what).encode()).hexdigest()[:6]
JOB = f"runs/{RUN}/jobs/{named(STUDY)}/"
TABLE = JOB + f"{{}}-{named(ALL_ROWS)}.done"

def drawer_of(wildcards):
    "The generator that a method needs: its output file, or nothing."
    part = ROWS[wildcards.row].split(":")
    return [f"runs/{RUN}/baseline-{part[1]}.done"] if len(part) == 3 and part[1] != "given" else []

rule encoder:
    input: code("51_phenotype_prediction"), drawer_of
    output: touch(JOB + "phenotypes-{row}.done")
    resources: gpu=1
    params: row=lambda w: ROWS[w.row], knobs=STUDY
    shell: f"papermill nbs/51_phenotype_prediction.ipynb {JOB}51_{{wildcards.row}}.ipynb -p table False -p methods {{params.row}} {{params.knobs}}"

rule disease_folds:
    input: code("50_disease_classification"), JOB + "phenotypes-{row}.done"
    output: touch(JOB + "disease-{row}-{disease}-{part}.done")
    wildcard_constraints: disease="cad|cm|hf", part="[ab]"
    resources: gpu=1
    params: row=lambda w: ROWS[w.row], folds=lambda w: FOLDS[w.part], knobs=STUDY
    shell: f"papermill nbs/50_disease_classification.ipynb {JOB}50_{{wildcards.row}}_{{wildcards.disease}}_{{wildcards.part}}.ipynb -p methods {{params.row}} -p diseases {{wildcards.disease}} -r folds '{{params.folds}}' {{params.knobs}}"

rule hospital_folds:
    input: code("52_external_validation"), JOB + "phenotypes-{row}.done"
    output: touch(JOB + "hospital-{row}-{part}.done")
    wildcard_constraints: part="[ab]"
    resources: gpu=1
    params: row=lambda w: ROWS[w.row], folds=lambda w: FOLDS[w.part], knobs=STUDY
    shell: f"papermill nbs/52_external_validation.ipynb {JOB}52_{{wildcards.row}}_{{wildcards.part}}.ipynb -p methods {{params.row}} -r folds '{{params.folds}}' {{params.knobs}}"

rule table2:
    input: code("50_disease_classification"), expand(JOB + "phenotypes-{row}.done", row=ROWS), expand(JOB + "disease-{row}-{disease}-{part}.done", row=ROWS, disease=["cad", "cm", "hf"], part=FOLDS)
    output: touch(TABLE.format("table2")), f"runs/{RUN}/figures/table2_all.csv"
    log: f"runs/{RUN}/50_disease_classification.ipynb"
    params: STUDY + " " + ALL_ROWS
    shell: "papermill nbs/50_disease_classification.ipynb {params}"

rule table3:
    input: code("51_phenotype_prediction"), expand(JOB + "phenotypes-{row}.done", row=ROWS)
    output: touch(TABLE.format("table3")), f"runs/{RUN}/figures/table3_all.csv"
    log: f"runs/{RUN}/51_phenotype_prediction.ipynb"
    params: STUDY + " " + ALL_ROWS
    shell: "papermill nbs/51_phenotype_prediction.ipynb {params}"

rule table4:
    input: code("52_external_validation"), expand(JOB + "phenotypes-{row}.done", row=ROWS), expand(JOB + "hospital-{row}-{part}.done", row=ROWS, part=FOLDS)
    output: touch(TABLE.format("table4")), f"runs/{RUN}/figures/table4_all.csv"
    log: f"runs/{RUN}/52_external_validation.ipynb"
    params: STUDY + " " + ALL_ROWS
    shell: "papermill nbs/52_external_validation.ipynb {params}"

rule turing_test:
    input: code("43_turing_test"), rules.amdf.output
    output: f"runs/{RUN}/turing/done.json"
    log: f"runs/{RUN}/43_turing_test.ipynb"
    threads: BOTH
    resources: gpu=1
    params: READ
    shell: "papermill nbs/43_turing_test.ipynb {params}"

rule reader_study:
    input: code("66_reader_study"), rules.amdf.output
    output: f"runs/{RUN}/reader_study/done.json"
    log: f"runs/{RUN}/66_reader_study.ipynb"
    threads: BOTH
    resources: gpu=1
    params: READ
    shell: "papermill nbs/66_reader_study.ipynb {params}"

rule real_ecgs:
    input: code("36_real_ecgs"), rules.amdf.output
    output: f"runs/{RUN}/real_ecgs/done.json"
    log: f"runs/{RUN}/36_real_ecgs.ipynb"
    threads: BOTH
    resources: gpu=1
    params: KNOBS
    shell: "papermill nbs/36_real_ecgs.ipynb {params}"

rule cost:
    input: code("96_cost")
    output: f"runs/{RUN}/cost/done.json"
    log: f"runs/{RUN}/96_cost.ipynb"
    threads: 1
    params: KNOBS
    shell: "papermill nbs/96_cost.ipynb {params}"

# The paper's page reads the run's figures/. Only virtual hearts, and by itself no smoke run, are copied to the repository's figures/.
PUBLISH = str(config.get("publish", not SMOKE and config.get("cohort", "virtual") == "virtual"))
if PUBLISH not in ("True", "False"): raise WorkflowError("publish: valid are True, False")
PAGE = " ".join(f"-p {k} {shlex.quote(str(config[k]))}" for k in ("preset", "cohort", "run", "seed") if config.get(k, "") != "") + f" -p publish {PUBLISH}"

rule paper:   # Tables 1 to 4, Figures 2 and 3
    input: code("90_paper"), rules.table1.output, rules.ablation.output, rules.noise_scale.output, rules.turing_test.output, rules.table2.output, rules.table3.output, rules.table4.output
    output: touch(TABLE.format("paper"))
    log: f"runs/{RUN}/90_paper.ipynb"
    threads: 1
    params: PAGE
    shell: "papermill nbs/90_paper.ipynb {params}"

rule papers:   # and what chapters 17 and 90 show of the second paper and of the generator
    input: rules.paper.output, rules.obedience.output, rules.few_steps.output, rules.reader_study.output, rules.screening.output, rules.label_efficiency.output, rules.subtypes.output, rules.phenotypes_from_generated.output
    output: touch(TABLE.format("papers"))
    log: f"runs/{RUN}/90_papers.ipynb"
    threads: 1
    params: PAGE
    shell: f"papermill nbs/90_paper.ipynb runs/{RUN}/90_papers.ipynb {{params}}"
