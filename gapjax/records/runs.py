"""One training run as records: what reproduce/ adds to those of its cell, and what `gapjax train`
and `report` tell of a run alone, as the suite with one cell."""

from gapjax import paths, recipes
from gapjax.records.schema import SCHEMA, cell_name, spread
from gapjax.tasks import TASKS
from gapjax.tasks.consistency import protocols

# What a detail has of a summary, averaged over seeds.
AVERAGED = ('per_location', 'shifts', 'per_class')
# What every summary has, and of what type.
SUMMARY = {'config': dict, 'step': int, 'final': dict, 'best': dict, 'sizes': dict,
           'wall_seconds': (float, int), 'images_per_second': (float, int, type(None))}
# The curves of a detail: the split and the key of their lines in metrics.jsonl.
CURVES = {'train_loss': ('train', 'loss'), 'eval_accuracy': ('eval', 'accuracy'),
          'eval_consistency': ('eval', 'consistency')}
# config.model.downsample -> network
DOWNSAMPLING = {'blur': 'blurpool', 'polyphase': 'aps', 'learned_polyphase': 'lps'}
# config.model.padding -> network
PADDING = {model['padding']: name for name, (model, pair) in recipes.SHIFT_NETWORKS.items()
           if [*model] == ['padding'] and pair is recipes.SINGLE}


def records(summary, lines, *, seed: int) -> list[dict]:
  """The records of one seed, as schema.py has them: one a metric, the detail in the first.

  Args:
    summary: of summary.json.
    lines: of metrics.jsonl.
    seed: with which it was trained.
  """
  metrics = [{'metric': metric, 'values': [value], 'seeds': [seed], **spread([value]),
              **protocol(metric, summary['config'])}
             for metric, value in metrics_of(summary).items()]
  return [{**metrics[0], 'detail': detail(summary, lines)}, *metrics[1:]]


def single(workdir, summary) -> list[dict]:
  """The records of a run alone, and of the attack on its last checkpoint if there was one."""
  paths.check_fields(summary, SUMMARY, workdir / 'summary.json')
  config = summary['config']
  canvas = config['canvas'] if config['task'] == 'canvas' else {}
  asked = {key: canvas[key] for key in ('target', 'grid') if canvas}
  named = {'network': network_of(config), 'dataset': config['data']['name'], **asked}
  of_run = {
    'schema': SCHEMA, 'task': config['task'], **named, 'cell': cell_name(named), 'config': config,
    'commit': summary.get('commit'),
    **({} if TASKS[config['task']].dense else {'chance': summary['sizes']['chance']})}
  attack = workdir / 'attack.json'
  removed = paths.read_json(attack, list) if attack.exists() else []
  lines = paths.read_lines(workdir / 'metrics.jsonl')
  return [{**of_run, **record} for record in (
    *records(summary, lines, seed=config['seed']),
    *(record for record in removed if record.get('step') == summary['step']))]


def network_of(config) -> str:
  """The network that a config trains, as a record names it."""
  model, augshift = config['model'], config['augshift']
  # What differs from the plain network, so that no other network has the name of a table's row.
  plain, blur = DOWNSAMPLING.get(model['downsample']), model['blur_size']
  if plain == 'blurpool' and blur != 3:
    plain = f'blurpool_{blur}'
  elif plain in ('aps', 'lps') and blur > 1:
    plain += f'_blur_{blur}'
  padding = model['padding']
  differs = [plain, '' if padding == 'zero' else PADDING.get(padding, f'{padding}_padding')]
  if TASKS[config['task']].dense:
    return '_'.join(filter(None, [model['name'], *differs]))
  if config['task'] == 'canvas':
    name = model['name'] if model['head'] != 'permuted' else '_'.join([
      'permutenet', *(['fixed'] if model['permutation'] == 'fixed' else []), model['permute_at']])
    known = (known for known, fields in recipes.NETWORKS.items() if fields.items() <= model.items())
    return '_'.join(filter(None, [next(known, name), *differs]))
  pairs = 'augshift' if augshift['weight'] else 'two_crops'
  paired = augshift['crops'] > 1
  return '_'.join(filter(None, [
    pairs if paired else '', *differs,
    '' if paired or augshift['max_shift'] else 'unshifted'])) or model['name']


def metrics_of(summary) -> dict[str, float]:
  """The metrics of a run, by their names in results.json."""
  return {name: value for part in ('final', 'best') for name, value in summary[part].items()
          if name not in ('loss', 'step')}


def protocol(metric: str, config) -> dict[str, str]:
  """{'protocol': how a consistency was measured (consistency.py)}; {} of any other metric."""
  named = protocols(config['eval']['shift'])
  return {'protocol': named[metric]} if metric in named else {}


def detail(summary, lines) -> dict:
  """What the report's pictures and footnotes need of one seed."""
  config = summary['config']
  model = config['model']
  return {
    **{name: summary[name] for name in AVERAGED if name in summary}, 'curves': curves(lines),
    'wall_seconds': [summary['wall_seconds']],
    'images_per_second': summary['images_per_second'], 'epochs': config['num_epochs'],
    'steps': summary['step'], 'batch_size': config['batch_size'],
    'model': ' '.join([model['name'], *(
      [model['backbone']] if TASKS[config['task']].dense else []),
      f'width {model["width"]}']), **summary['sizes']}


def curves(lines) -> dict[str, list]:
  """{name: [[step, value], ...]} of CURVES; a resumed run repeats steps: its last word counts."""
  by_step = {name: {line['step']: line[key] for line in lines
                    if line.get('split') == split and key in line}
             for name, (split, key) in CURVES.items()}
  return {name: [list(point) for point in sorted(points.items())]
          for name, points in by_step.items() if points}
