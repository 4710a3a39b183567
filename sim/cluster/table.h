// Measured rates as a function of shape: points on a few grids, interpolated in log space. One Table holds
// one grid for every kind of shape that was measured (say attention of head width 64, 128, 192); between
// kinds the nearest win.
#pragma once
#include <array>
#include <span>
#include <string>
#include <vector>

namespace mop::cluster {

// A full or partly measured rectangular grid of up to 3 axes. Missing points take the nearest measured one's
// value along the axes, so that a skipped corner (too large to measure) does not leave a hole.
struct Grid {
  std::vector<double> at;                 // where this grid lies: one coordinate a kind axis of the table
  std::vector<std::vector<double>> axes;  // rising coordinates of each grid axis
  std::vector<double> log_values;         // row-major, the last axis fastest
};

class Table {
 public:
  // kinds, axes: names, for errors and reports. points: one row of coordinates (kinds, then axes) and a value
  // each. Errors: UserError naming the table for an empty one, a non-positive coordinate or value, ragged
  // rows, duplicates.
  Table() = default;
  Table(std::string name, size_t kinds, size_t axes, std::span<const std::vector<double>> points);

  struct Value {
    double value;  // same unit as the points
    bool outside;  // beyond the measured range by more than 5 %, or a kind more than 2x away from any
                   // measured one
  };
  // coordinates: kinds, then axes; clamped to the measured range. O(2^axes) a grid.
  Value at(std::span<const double> coordinates) const;
  Value at(std::initializer_list<double> coordinates) const {
    return at(std::span(coordinates.begin(), coordinates.size()));
  }
  bool empty() const { return grids_.empty(); }
  void scale(double factor);  // every value

 private:
  std::string name_;
  size_t kinds_ = 0, axes_ = 0;
  std::vector<Grid> grids_;
};

}  // namespace mop::cluster
