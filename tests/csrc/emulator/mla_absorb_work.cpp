// How csrc/mla_absorb/work.cuh cuts sequences, checked for many batches: every tile is taken once, by one block; pieces
// of a sequence know how many there are and have places of their own for what they leave.
#include "mla_absorb/work.cuh"

#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <set>
#include <utility>
#include <vector>

using namespace hylo::mla_absorb;

struct Batch {
  std::vector<int> lengths;
  int clusters, shift, least;
  Cut cut;
};

void require(bool holds, const char* what, const Batch& batch) {
  if (holds) return;
  std::printf("%s: %d clusters of %d, least %d, cut %d, lengths", what, batch.clusters, 1 << batch.shift, batch.least,
              batch.cut);
  for (const int length : batch.lengths) std::printf(" %d", length);
  std::printf("\n");
  std::exit(1);
}

int gathered = 0;  // sequences that blocks merge together

// Returns the number of pieces.
int check(const Batch& batch) {
  constexpr int kCapacity = 1 << 20;
  std::vector<Sequence> sequences;
  Count units{0, 0};
  for (const int length : batch.lengths) {
    sequences.push_back(sequence_of(length, 0, kCapacity, batch.cut));
    units.total += sequences.back().units;
    if (sequences.back().units > units.most) units.most = sequences.back().units;
  }
  const int count = static_cast<int>(sequences.size());
  const int share = share_of(units, count, batch.clusters, batch.least, batch.cut);
  const long long slots = slots_of(count, kCapacity, batch.clusters, batch.cut);
  std::map<std::pair<int, int>, int> tiles;  // how often each is taken
  std::vector<std::set<int>> indices(sequences.size());
  std::vector<int> pieces(sequences.size(), -1), shares(sequences.size(), -1);
  std::set<int> taken_slots, tickets;
  for (int cluster = 0; cluster < batch.clusters; ++cluster) {
    Run run = run_of(cluster, share, units.total);
    for (int b = 0; b < count && run.first_unit + sequences[b].units <= run.unit; ++b) {
      run.first_unit += sequences[b].units;
      run.b = b + 1;
    }
    while (run.unit < run.last) {
      const Piece piece = take(run, sequences[run.b], count, batch.shift, batch.cut);
      require(piece.ends == (run.unit >= run.last), "a run's end", batch);
      require(indices[piece.b].insert(piece.index).second, "a piece comes twice", batch);
      require(pieces[piece.b] == -1 || pieces[piece.b] == piece.pieces, "pieces do not agree", batch);
      pieces[piece.b] = piece.pieces;
      require(shares[piece.b] == -1 || shares[piece.b] == piece.shares, "shares do not agree", batch);
      shares[piece.b] = piece.shares;
      if (piece.shares > 1) {
        require(piece.index >= piece.shares || piece.ends, "a block with more to do would wait", batch);
        if (piece.index < piece.shares) {
          const int slot = piece.slot_of_share(piece.index);
          require(slot >= 0 && slot < slots && tickets.insert(slot).second, "a share's ticket", batch);
        }
      }
      if (piece.pieces > 1 && piece.index == 0) {
        require(tickets.insert(piece.slot(0)).second, "a ticket", batch);
      }
      if (piece.pieces > 1) {
        const int slot = piece.slot(piece.index);
        require(slot >= 0 && slot < slots && taken_slots.insert(slot).second, "a slot", batch);
      }
      for (int rank = 0; rank < 1 << batch.shift; ++rank) {
        const Turns turns = turns_of(piece, rank, batch.shift);
        for (int i = 0; i < turns.count; ++i) ++tiles[{piece.b, turns.first + (i << batch.shift)}];
      }
    }
  }
  int all_tiles = 0, all_pieces = 0;
  for (int b = 0; b < count; ++b) {
    all_tiles += sequences[b].tiles;
    all_pieces += pieces[b];
    require(static_cast<int>(indices[b].size()) == pieces[b], "pieces are missing", batch);
    const bool together = batch.cut == kTiles && pieces[b] > kFewPieces;
    require(together ? shares[b] >= pieces[b] - 1 : shares[b] == 1, "shares", batch);
    require(batch.cut != kWhole || pieces[b] == 1, "a whole sequence is cut", batch);
    gathered += together;
  }
  require(static_cast<int>(tiles.size()) == all_tiles, "tiles are missing", batch);
  for (const auto& [tile, times] : tiles) require(times == 1, "a tile is taken twice", batch);
  return all_pieces;
}

int main() {
  std::mt19937 random(0);
  const auto below = [&](int number) { return static_cast<int>(random() % number); };
  for (int i = 0; i < 3000; ++i) {
    constexpr Cut kCuts[] = {kTiles, kTiles, kTiles, kTiles, kByLength, kWhole};
    Batch batch{{}, 1 + below(20), below(5), 1 + below(20), kCuts[below(6)]};
    const int count = 1 + below(12), size = 1 << below(14);
    const bool equal = below(3) == 0;
    for (int b = 0; b < count; ++b) batch.lengths.push_back(equal && b > 0 ? batch.lengths[0] : below(size));
    check(batch);
  }
  if (gathered < 300) return std::printf("%d sequences are merged together: too few to say anything\n", gathered), 1;
  // Equal sequences are cut alike, or not at all, where runs are hardly longer for it.
  const Batch whole{std::vector<int>(128, 4096), 132, 0, 2, kTiles};
  require(check(whole) == 128, "sequences are cut", whole);
  const Batch quarters{std::vector<int>(32, 4096), 132, 0, 2, kTiles};
  require(check(quarters) == 4 * 32, "sequences are not cut into quarters", quarters);
  const Batch by_clusters{std::vector<int>(32, 4096), 33, 2, 2, kTiles};
  require(check(by_clusters) == 32, "sequences are cut", by_clusters);
  return 0;
}
