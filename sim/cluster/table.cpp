#include "sim/cluster/table.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>

#include "sim/base/error.h"

namespace mop::cluster {
namespace {

double interpolate(const Grid& grid, std::span<const double> x, bool& outside) {
  // Cell and weight on every axis, clamped to the grid.
  std::array<size_t, 3> low{};
  std::array<double, 3> weight{};
  const size_t axes = grid.axes.size();
  for (size_t a = 0; a < axes; ++a) {
    const auto& axis = grid.axes[a];
    if (x[a] < axis.front() * 0.95 || x[a] > axis.back() * 1.05) outside = true;
    if (axis.size() == 1 || x[a] <= axis.front()) continue;
    if (x[a] >= axis.back()) {
      low[a] = axis.size() - 2;
      weight[a] = 1;
      continue;
    }
    low[a] = static_cast<size_t>(std::upper_bound(axis.begin(), axis.end(), x[a]) - axis.begin()) - 1;
    weight[a] = std::log(x[a] / axis[low[a]]) / std::log(axis[low[a] + 1] / axis[low[a]]);
  }
  double sum = 0;
  for (size_t corner = 0; corner < (size_t{1} << axes); ++corner) {
    double w = 1;
    size_t index = 0;
    for (size_t a = 0; a < axes; ++a) {
      const bool high = (corner >> a) & 1;
      w *= high ? weight[a] : 1 - weight[a];
      index = index * grid.axes[a].size() + std::min(low[a] + (high ? 1 : 0), grid.axes[a].size() - 1);
    }
    if (w > 0) sum += w * grid.log_values[index];
  }
  return sum;
}

void fill_holes(Grid& grid) {
  // Steps from a hole to a measured point, counted over the axes; the nearest wins, lower coordinates on
  // ties.
  const size_t axes = grid.axes.size();
  std::vector<std::vector<size_t>> position(grid.log_values.size(), std::vector<size_t>(axes));
  for (size_t i = 0; i < grid.log_values.size(); ++i) {
    size_t rest = i;
    for (size_t a = axes; a-- > 0;) position[i][a] = rest % grid.axes[a].size(), rest /= grid.axes[a].size();
  }
  const std::vector<double> measured = grid.log_values;
  for (size_t i = 0; i < measured.size(); ++i) {
    if (!std::isnan(measured[i])) continue;
    size_t best = std::numeric_limits<size_t>::max();
    for (size_t j = 0; j < measured.size(); ++j) {
      if (std::isnan(measured[j])) continue;
      size_t steps = 0;
      for (size_t a = 0; a < axes; ++a)
        steps += position[i][a] > position[j][a] ? position[i][a] - position[j][a]
                                                 : position[j][a] - position[i][a];
      if (steps < best) best = steps, grid.log_values[i] = measured[j];
    }
  }
}

}  // namespace

Table::Table(std::string name, size_t kinds, size_t axes, std::span<const std::vector<double>> points)
    : name_(std::move(name)), kinds_(kinds), axes_(axes) {
  ensure(axes >= 1 && axes <= 3, "a table has 1 to 3 axes");
  if (points.empty()) throw UserError(fmt::format("table {} has no points", name_));
  std::map<std::vector<double>, std::vector<const std::vector<double>*>> by_kind;
  for (const auto& p : points) {
    if (p.size() != kinds + axes + 1)
      throw UserError(
          fmt::format("table {}: a point has {} numbers, not {}", name_, p.size(), kinds + axes + 1));
    for (const double v : p)
      if (!(v > 0) || !std::isfinite(v))
        throw UserError(fmt::format("table {}: {} is not a positive number", name_, v));
    by_kind[{p.begin(), p.begin() + static_cast<std::ptrdiff_t>(kinds)}].push_back(&p);
  }
  for (const auto& [at, members] : by_kind) {
    Grid grid{at, std::vector<std::vector<double>>(axes), {}};
    for (size_t a = 0; a < axes; ++a) {
      for (const auto* p : members) grid.axes[a].push_back((*p)[kinds + a]);
      std::sort(grid.axes[a].begin(), grid.axes[a].end());
      grid.axes[a].erase(std::unique(grid.axes[a].begin(), grid.axes[a].end()), grid.axes[a].end());
    }
    size_t size = 1;
    for (const auto& axis : grid.axes) size *= axis.size();
    grid.log_values.assign(size, std::numeric_limits<double>::quiet_NaN());
    for (const auto* p : members) {
      size_t index = 0;
      for (size_t a = 0; a < axes; ++a) {
        const auto& axis = grid.axes[a];
        index =
            index * axis.size() +
            static_cast<size_t>(std::lower_bound(axis.begin(), axis.end(), (*p)[kinds + a]) - axis.begin());
      }
      if (!std::isnan(grid.log_values[index]))
        throw UserError(fmt::format("table {}: a point is given twice", name_));
      grid.log_values[index] = std::log(p->back());
    }
    fill_holes(grid);
    grids_.push_back(std::move(grid));
  }
}

Table::Value Table::at(std::span<const double> x) const {
  ensure(!grids_.empty() && x.size() == kinds_ + axes_, "a table is asked for with all its coordinates");
  const std::span<const double> on_grid = x.subspan(kinds_);
  double sum = 0, weights = 0, nearest = std::numeric_limits<double>::infinity();
  bool outside = false, nearest_outside = false;
  for (const Grid& grid : grids_) {
    double distance = 0;
    for (size_t k = 0; k < kinds_; ++k) {
      const double d = std::log2(x[k] / grid.at[k]);
      distance += d * d;
    }
    bool beyond = false;
    const double value = interpolate(grid, on_grid, beyond);
    if (distance < 1e-12) return {std::exp(value), beyond};
    const double w = 1 / (distance * distance);
    sum += w * value;
    weights += w;
    if (distance < nearest) nearest = distance, nearest_outside = beyond;
  }
  outside = nearest_outside || nearest > 1;
  return {std::exp(sum / weights), outside};
}

void Table::scale(double factor) {
  for (Grid& grid : grids_)
    for (double& value : grid.log_values) value += std::log(factor);
}

}  // namespace mop::cluster
