#include "plans.h"

#include <pybind11/stl.h>

#include <list>
#include <map>
#include <string>

namespace py = pybind11;

namespace fusedrnn::cuda {
namespace {

// Calls f(name, field) for all that an estimate depends on.
template <class C, class F>
void each_field(C& candidate, const F& f) {
  auto& [plan, work, at_once] = candidate;
  f("exchange", plan.exchange);
  f("tiles", plan.tiles);
  f("resident", plan.resident);
  f("on_chip", plan.on_chip);
  f("staged", plan.staged);
  f("groups", plan.groups);
  f("splits", plan.splits);
  f("blocks_x", plan.blocks_x);
  f("row_groups", plan.row_groups);
  f("P", plan.P);
  f("on_matrix_units", work.on_matrix_units);
  f("operand_bytes", work.operand_bytes);
  f("octets", work.octets);
  f("group_units", work.group_units);
  f("segments", work.segments);
  f("block_depth", work.block_depth);
  f("held", work.held);
  f("at_once", at_once);
}

// Calls f(name, cost) for all costs.
template <class F>
void each_cost(Costs& costs, const F& f) {
#define COST(name, value) f(#name, costs.name);
#include "costs.inc"
#undef COST
}

std::map<std::string, double> usual_costs() {
  std::map<std::string, double> all;
  Costs costs;
  each_cost(costs, [&](const char* name, double cost) { all[name] = cost; });
  return all;
}

std::vector<double> estimates(const std::vector<std::map<std::string, index>>& plans,
                              const std::map<std::string, double>& some_costs) {
  Costs costs;
  each_cost(costs, [&](const char* name, double& cost) {
    if (const auto found = some_costs.find(name); found != some_costs.end()) {
      cost = found->second;
    }
  });
  std::vector<double> cycles;
  for (const auto& fields : plans) {
    Candidate candidate{};
    each_field(candidate, [&]<class T>(const char* name, T& field) {
      field = static_cast<T>(fields.at(name));
    });
    cycles.push_back(estimate(candidate, costs));
  }
  return cycles;
}

std::vector<double> time_recurrences(const py::function& run) {
  std::list<Timer> all;
  struct Recording {
    explicit Recording(std::list<Timer>& to) { timers = &to; }
    ~Recording() { timers = nullptr; }
  };
  {
    const Recording recording(all);
    run();
  }
  std::vector<double> seconds;
  for (const Timer& timer : all) seconds.push_back(timer.seconds());
  return seconds;
}

}  // namespace

py::dict to_dict(const Candidate& candidate) {
  py::dict fields;
  each_field(candidate, [&]<class T>(const char* name, T field) {
    fields[name] = static_cast<index>(field);
  });
  return fields;
}

void define_plans(py::module_& m) {
  m.def(
      "wish",
      [](int exchange, int tiles, int resident, int on_chip, int staged, int groups,
         int splits, int blocks_x) {
        plan_override = {exchange, tiles,  resident, on_chip,
                         staged,   groups, splits,   blocks_x};
      },
      py::arg("exchange") = -1, py::arg("tiles") = 0, py::arg("resident") = -1,
      py::arg("on_chip") = -1, py::arg("staged") = -1, py::arg("groups") = 0,
      py::arg("splits") = 0, py::arg("blocks_x") = 0);
  m.def("costs", &usual_costs);
  m.def("estimates", &estimates);
  m.def("time_recurrences", &time_recurrences);
}

}  // namespace fusedrnn::cuda
